"""What shared passes save, where both ways were timed; nothing is told where they were not."""

import pytest
import torch
from support.parity import spec_of, trainer, workload_of

from lorasweep.models import base_model
from lorasweep.packing import pass_cost
from lorasweep.training import engine

pytestmark = pytest.mark.usefixtures("always_together")

OVERHEAD = pass_cost.overhead
"""What always_together replaces."""


def test_saving_is_known_once_both_ways_are_timed():
    found, costs, told = pass_cost.Comparison(), {True: 2.0, False: 3.0}, []
    for _ in range(8):
        way = found.together((1, 2))
        found.took(way, 10 * costs[way], 10)
        told.append((way, found.spared))
    assert told == [(True, None), (False, None)] * 2 + [(True, None), (False, 1.0), (True, 1.0), (True, 1.0)]
    found.together((1, 3))
    assert found.spared is None, "nothing is known of other trials"


@pytest.mark.parametrize(("common", "saved"), [(1.0, True), (3.5, False)])
def test_saving_of_shared_passes_goes_by_tokens(tiny_bert, common, saved):
    """Eight steps: three together and three apart, then two the faster way; apart a token takes three seconds."""
    specs = [spec_of("seq_cls", tiny_bert, "train.max_steps=8", f"lora.r={r}") for r in (2, 64)]
    made, ended, tokens = trainer(specs[0], workload_of("seq_cls", tiny_bert)), {}, []
    made.width, made._comparison = 2, pass_cost.Comparison()
    took = made._comparison.took

    def timed(together, seconds, count):
        tokens.append(count)
        took(together, (common if together else 3.0) * count, count)

    made._comparison.took = timed
    jobs = [engine.Job(i, spec) for i, spec in enumerate(specs)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.StepEvent) and event.step == 5:
            assert [s.packing_saved_s for s in made.slots] == [None, None], "not known yet"
        if isinstance(event, engine.TrialEnded):
            ended[event.number] = event.packing_saved_s
    if not saved:
        assert set(ended.values()) == {None}, "they went apart"
        return
    assert sum(ended.values()) == pytest.approx((3.0 - common) * sum(tokens[6:]))


def test_saving_goes_on_with_a_checkpoint(tiny_bert, tmp_path):
    spec = spec_of("seq_cls", tiny_bert, "train.max_steps=3")
    made, path = trainer(spec, workload_of("seq_cls", tiny_bert)), tmp_path / "c.pt"
    waiting = [engine.Job(0, spec)]
    events = made.run(lambda: waiting.pop() if waiting else None)
    for event in events:
        if isinstance(event, engine.StepEvent):
            made.slots[0].packing_saved_s = 1.5
            made.checkpoint(0, path, {})
            break
    events.close()
    fresh, jobs = trainer(spec, workload_of("seq_cls", tiny_bert)), [engine.Job(0, spec, checkpoint=path)]
    for event in fresh.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialBegan):
            assert event.step == 1 and fresh.slots[0].packing_saved_s == 1.5


def test_cost_of_a_pass_leaves_out_the_first_slow_ones(tiny_bert, monkeypatch):
    """A pass of N tokens takes 50 + N ms; a process's first ones, and a busy machine's, ten seconds more."""
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    examples, rounds = work.examples["train"], []

    def seconds(batch, *_):
        rounds.append(len(batch.labels))
        slow = len(rounds) <= 2 or len(rounds) % 3 == 0
        return (50 + batch.inputs["input_ids"].numel()) / 1e3 + 10 * slow

    monkeypatch.setattr(pass_cost, "_seconds", seconds)
    monkeypatch.setattr(pass_cost, "LONG_S", 1e3)
    net = base_model.load(spec.model, spec.train, work.task, work.tokenizer).model
    cost = OVERHEAD(net, work.task, examples, work.tokenizer.pad_token_id, torch.device("cpu"))
    assert cost == pytest.approx(50)
    assert rounds[:4] == [1, rounds[1], 1, rounds[1]] and rounds[1] > 1, "small and large in turn"

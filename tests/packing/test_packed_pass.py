"""A trial in a pack ends as it would alone: the same losses, gradients, metrics and weights, whoever is beside it."""

import gc
import itertools
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import transformers
from support.models import saved, wordpiece
from support.parity import (
    DROPPED,
    EXACT,
    OPTIONS,
    PLAIN,
    TASKS,
    alone,
    check,
    close,
    models,
    run,
    spec_of,
    tensors,
    trainer,
    workload_of,
)

from lorasweep.cli import main
from lorasweep.config.spec import LoraSpec, TrainSpec
from lorasweep.lora import adapter
from lorasweep.models import row_order
from lorasweep.packing import dropout, fused_linear, packed_pass, pass_cost
from lorasweep.training import engine, evaluation

pytestmark = pytest.mark.usefixtures("always_together")

ALONE: dict[str, tuple[str, ...]] = {
    "base_dropout": ("model.base_dropout=true",),
}
"""Options with one slot."""

ELSEWHERE = {
    "lora.full": "trains alone",
    "train.keep": "tests/training/test_best.py",
    "train.patience": "tests/training/test_best.py",
    "lora.eva_rho": "sizes the ranks that option eva packs",
    "train.epochs": "a number of steps",
    "train.max_steps": "SMALL and option steps",
    "train.eval_every": "SMALL",
    "train.slots": "the number of slots itself",
    "train.prefix_cache_gib": "tests/training/test_prefix_cache.py",
    "train.eval_batch_size": "trials with other sizes are evaluated apart",
    "train.max_loss_ratio": "tests/training/test_checkpoint.py",
    "train.lr_multiple": "tests/training/test_learning_rate.py",
    "train.optimizer": "tests/hardware/test_device.py",
    "train.device": "one for all trials of a base",
    "train.precision": "one for all trials of a base; tests/training/test_precision.py",
    "train.deterministic": "tests/hardware/test_device.py",
}
"""Keys of lora and train that no option here sets, and why."""


@pytest.mark.parametrize("option", OPTIONS)
def test_packed_trial_equals_the_solo_one(tiny_bert, double, option):
    own = OPTIONS[option]
    check("seq_cls", tiny_bert, [own, PLAIN, (*own, "train.seed=3"), DROPPED], 4, EXACT)


@pytest.mark.parametrize(
    ("option", "setting", "own"),
    [
        ("pissa", "OWN_BYTES", False),
        ("pissa_dropout", "OWN_BYTES", False),
        ("pissa_dropout", "READ", True),
        ("olora", "READ", True),
        ("dora_olora", "OWN_BYTES", False),
    ],
)
def test_trials_with_base_weights_of_their_own_compute_in_both_ways(
    tiny_bert, double, monkeypatch, option, setting, own
):
    """With weights of their own, or with the start, A and s B, taken from the frozen product: always where the weights
    are too large to keep, and where a trial has few rows.
    """
    monkeypatch.setattr(packed_pass, setting, 0)
    has_own, ways = packed_pass.Pass._has_own, set()

    def seen(self, module, at, one):
        found = has_own(self, module, at, one)
        if module in one.start:
            ways.add(found)
        return found

    monkeypatch.setattr(packed_pass.Pass, "_has_own", seen)
    start = OPTIONS[option]
    check("seq_cls", tiny_bert, [start, PLAIN, (*start, "train.seed=3"), DROPPED], 4, EXACT)
    assert ways == (set() if option == "dora_olora" else {own})


@pytest.mark.parametrize(("rows", "trials", "own"), [(4, 2, False), (1000, 2, True), (4, 1, True)])
def test_few_rows_take_the_start_from_the_common_product(rows, trials, own):
    module, stream = torch.nn.Linear(32, 32), dropout.DropoutStream(torch.device("cpu"))
    start = torch.zeros(4, 32), torch.zeros(32, 4)
    one = packed_pass.Layers(stream, own={module: module.weight}, start={module: start})
    made = packed_pass.Pass([packed_pass.Part(one, slice(i * rows, (i + 1) * rows), {}) for i in range(trials)])
    assert made._has_own(module, slice(0, rows), one) is own


def test_every_option_of_a_trial_is_named_with_its_slots():
    rows = [*OPTIONS.values(), *ALONE.values(), PLAIN, DROPPED]
    named = {word.partition("=")[0] for row in rows for word in row} | ELSEWHERE.keys()
    keys = {f"lora.{f.name}" for f in fields(LoraSpec)} | {f"train.{f.name}" for f in fields(TrainSpec)}
    assert keys <= named, keys - named


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_packs(tiny_bert, tiny_llama, double, task, dropout):
    folder, more = models(task, tiny_bert, tiny_llama)
    trials = [(f"lora.lora_dropout={dropout}",), (*PLAIN, f"lora.lora_dropout={dropout}"), DROPPED]
    if task != "causal_lm":
        trials.append(("lora.bias=all", "train.seed=4"))
    check(task, folder, trials, 4, EXACT, *more)


@pytest.mark.parametrize(
    ("task", "option"), [*((task, "dropout") for task in TASKS), ("seq_cls", "pissa_dropout"), ("seq_cls", "dora")]
)
def test_single_precision_differs_by_rounding_only(tiny_bert, tiny_llama, task, option):
    """What each option computes is shown in double precision; here, that it does so in the precision of a user.

    One step from a random B: with B = 0 the gradients of all A would be 0. Cosines divided by a temperature have
    their rounding multiplied."""
    near = 3e-5  # rounding by the order of sums, which differs from CPU to CPU: 2e-5 was seen
    folder, more = models(task, tiny_bert, tiny_llama)
    trials = [(*OPTIONS[option], "train.max_steps=1"), (*PLAIN, "train.max_steps=1"), (*DROPPED, "train.max_steps=1")]
    random_B = ["lora.init_lora_weights=false"]
    specs = [spec_of(task, folder, *more, *random_B, *one) for one in trials]
    work = workload_of(task, folder, *more)
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 3)
    for i, spec in enumerate(specs):
        expected = alone(spec, work, i)
        assert found[i].losses == pytest.approx(expected.losses, rel=near)
        floor = 1e-6 * max(float(slope.norm()) for slope in expected.gradients[0].values())
        for name, slope in expected.gradients[0].items():
            apart = float((found[i].gradients[0][name] - slope).norm())
            assert apart <= near * float(slope.norm()) + floor, name


def test_adapted_head_of_a_language_model_packs(tiny_llama, double):
    """Without it, the loss takes a short cut past the head's forward."""
    head = ("lora.target_modules=[lm_head,q_proj]",)
    saved = ("lora.target_modules=[q_proj]", "lora.modules_to_save=[lm_head,embed_tokens]")
    check("causal_lm", tiny_llama, [head, PLAIN, saved, DROPPED], 4, EXACT)


def test_head_inside_a_module_that_some_save_packs(tmp_path, double):
    """BERT's head as a language model: a transform and the matrix of the embeddings in one module."""
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    config.is_decoder = True
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    saved = ("lora.target_modules=[query]", "lora.modules_to_save=[cls.predictions.transform.dense]")
    whole = ("lora.target_modules=[query]", "lora.modules_to_save=[predictions]", "train.seed=4")
    check("causal_lm", tmp_path, [saved, PLAIN, whole, DROPPED], 4, EXACT)
    check("causal_lm", tmp_path, [whole, (*whole, "train.seed=5")], 2, EXACT)


TIED = {
    "saved_embedding": ("lora.target_modules=[q_proj]", "lora.modules_to_save=[embed_tokens]"),
    "saved_head": ("lora.target_modules=[q_proj]", "lora.modules_to_save=[lm_head]"),
    "adapted_embedding": ("lora.target_modules=[embed_tokens,q_proj]",),
    "adapted_head": ("lora.target_modules=[lm_head,q_proj]",),
}


@pytest.mark.parametrize("option", TIED)
def test_tied_embeddings_pack(tied_llama, double, option):
    check("causal_lm", tied_llama, [TIED[option], PLAIN, DROPPED, (*TIED[option], "train.seed=3")], 4, EXACT)


def test_evaluation_is_packed(tiny_bert, double, monkeypatch):
    """The trials that are due together answer in the same passes; check() compares their metrics with solo ones."""
    widths, predict_for = [], evaluation.predict_for

    def watched(trials, *args):
        widths.append(trials)
        return predict_for(trials, *args)

    monkeypatch.setattr(evaluation, "predict_for", watched)
    check("seq_cls", tiny_bert, [PLAIN, DROPPED, ("lora.bias=all",)], 3, EXACT)
    assert widths[:2] == [3, 3]


def test_share_of_a_pass_goes_by_arithmetic(tiny_bert, monkeypatch):
    """Of two trials with as many rows, the one of a high rank pays for more of a pass."""
    specs = [spec_of("seq_cls", tiny_bert, f"lora.r={r}", "train.max_steps=2") for r in (2, 128)]
    made, shares = trainer(specs[0], workload_of("seq_cls", tiny_bert)), {}
    take = engine.Engine._take

    def watched(self, step, norm):
        shares[step.slot.number] = step.seconds, step.slot.flops_a_token
        return take(self, step, norm)

    monkeypatch.setattr(engine.Engine, "_take", watched)
    run(made, [engine.Job(i, spec) for i, spec in enumerate(specs)], 2)
    (low_s, low), (high_s, high) = shares[0], shares[1]
    assert high > 3 * low and high_s / low_s == pytest.approx(high / low)


# --- neighbours ------------------------------------------------------------------------------------------------------


def test_trial_on_the_base_goes_on_training_when_another_is_dropped(tiny_bert, double):
    """Each computes by itself, so that the first is still on the base."""
    specs, work = [spec_of("seq_cls", tiny_bert, *more) for more in (PLAIN, DROPPED)], workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)
    made.limits.most = 1

    def drop(event: engine.Event) -> None:
        if isinstance(event, engine.StepEvent) and (event.number, event.step) == (0, 2):
            made.drop(1)

    found = run(made, [engine.Job(i, spec) for i, spec in enumerate(specs)], 2, drop)
    assert len(found[1].losses) < len(found[0].losses)
    assert found[0].losses == pytest.approx(alone(specs[0], work).losses, rel=EXACT)


def test_neighbours_that_come_and_go_change_nothing(tiny_bert, double):
    """Three finish early, one is pruned in the middle; all slots are filled again and again."""
    long = ("train.max_steps=12", "lora.lora_dropout=0.2")
    short = [("train.max_steps=2", f"train.seed={i}", f"lora.r={i + 1}") for i in range(5)]
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in (long, *short)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)
    order: list[tuple[str, int]] = []

    def act(event):
        if isinstance(event, engine.TrialBegan | engine.TrialEnded):
            order.append((type(event).__name__, event.number))
        if isinstance(event, engine.StepEvent) and event.number == 2:
            made.prune(2, "enough")

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 3, act)
    assert (found[2].state, found[2].steps) == ("PRUNED", 1)
    assert order[:3] == [("TrialBegan", 0), ("TrialBegan", 1), ("TrialBegan", 2)]
    assert order[3:5] == [("TrialEnded", 2), ("TrialBegan", 3)], "the freed slot is filled at once"
    assert order[-1] == ("TrialEnded", 0)
    for i in (0, 1, 3, 4, 5):
        close(found[i], alone(specs[i], work, i), EXACT)


def test_trial_that_becomes_nan_ends_alone(tiny_bert, double):
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in ((), PLAIN, DROPPED)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)

    def act(event):
        if isinstance(event, engine.StepEvent) and (event.number, event.step) == (1, 2):
            (slot,) = [s for s in made.slots if s.number == 1]
            with torch.no_grad():
                slot.attached.parameters()[0].fill_(float("nan"))

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 3, act)
    assert (found[1].state, found[1].steps) == ("PRUNED", 2)
    for i in (0, 2):
        close(found[i], alone(specs[i], work, i), EXACT)


def test_trial_that_cannot_begin_leaves_the_others_in_their_slots(tiny_bert, double, monkeypatch):
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in ((), ("lora.r=5",), PLAIN)]
    work = workload_of("seq_cls", tiny_bert)
    made, attach = trainer(specs[0], work), adapter.attach

    def broken(base, lora, *rest):
        if lora.r == 5:
            raise RuntimeError("out of luck")
        return attach(base, lora, *rest)

    monkeypatch.setattr(adapter, "attach", broken)
    todo = [engine.Job(i, s) for i, s in enumerate(specs)]
    losses: dict[int, list[float]] = {0: [], 2: []}
    made.width = 2

    def follow():
        for event in made.run(lambda: todo.pop(0) if todo else None):
            if isinstance(event, engine.StepEvent):
                losses[event.number].append(event.loss)

    with pytest.raises(RuntimeError, match="out of luck"):
        follow()
    assert [s.number for s in made.slots] == [0]
    follow()
    for i in (0, 2):
        assert losses[i] == pytest.approx(alone(specs[i], work, i).losses, rel=EXACT)
    assert not any("lora" in n for n, _ in made.base.model.named_modules())


def test_dropped_trial_leaves_its_slot_to_the_next(tiny_bert, double):
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in ((), PLAIN, DROPPED)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)
    begun: list[int] = []

    def act(event):
        if isinstance(event, engine.TrialBegan):
            begun.append(event.number)
        if isinstance(event, engine.StepEvent) and event.number == 0 and event.step == 2:
            made.drop(0)

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2, act)
    assert begun == [0, 1, 2] and found[0].state == "" and len(found[0].losses) == 2
    for i in (1, 2):
        close(found[i], alone(specs[i], work, i), EXACT)


# --- trials that cannot share ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ""),
        (("lora.use_dora=true",), ""),
        (ALONE["base_dropout"], "base_dropout"),
        (OPTIONS["exact_loftq"], ""),
        (OPTIONS["parameters"], ""),
    ],
)
def test_reason_to_run_alone(tiny_bert, more, words):
    reason = packed_pass.alone_reason(spec_of("seq_cls", tiny_bert, *more))
    assert words in reason and bool(reason) == bool(words)


def test_trial_that_must_run_alone_runs_between_the_steps_of_the_others(tiny_bert):
    """Its numbers are those of a solo run, bit for bit; the others wait."""
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in ((), ALONE["base_dropout"], PLAIN)]
    work = workload_of("seq_cls", tiny_bert)
    order: list[int] = []

    def act(event):
        if isinstance(event, engine.StepEvent):
            order.append(event.number)

    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 3, act)
    assert order[:5] == [1] * 5
    assert found[1].losses == alone(specs[1], work, 1).losses != alone(specs[0], work, 0).losses
    assert {s.state for s in found.values()} == {"COMPLETE"}


def run_apart(made: engine.Engine, folder: Path, caplog: pytest.LogCaptureFixture, *more: str) -> None:
    """Run two trials that turn out not to share a pass; each ends as it would alone."""
    specs, work = [spec_of("seq_cls", folder, *one, *more) for one in ((), PLAIN)], workload_of("seq_cls", folder)
    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2)
    assert made.limits.most == 1 and "at most 1 trials share a pass" in caplog.text
    for i, spec in enumerate(specs):
        close(found[i], alone(spec, work, i), EXACT)


def test_layer_that_mixes_rows_makes_trials_run_one_after_another(tiny_bert, double, caplog):
    made = trainer(spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert))
    layer = made.base.model.bert.encoder.layer[1].output
    forward = layer.forward

    def mixed(hidden, residual):
        return forward(hidden.flatten()[None, None].view(1, -1, hidden.shape[-1]), residual.view(1, -1, 32)).view(
            residual.shape
        )

    layer.forward = mixed
    run_apart(made, tiny_bert, caplog)


@pytest.mark.parametrize("more", [(), ("lora.lora_bias=true",), ("lora.use_dora=true",)])
def test_layer_that_sees_some_of_the_tokens_makes_trials_run_one_after_another(tiny_bert, double, caplog, more):
    """As many tokens as would divide among the rows, but not in their order."""
    made = trainer(spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert))
    layer = made.base.model.bert.encoder.layer[0].intermediate
    dense = layer.forward

    def routed(hidden):
        """Compute the last token of each row apart from the others, as experts would."""
        flat, others = hidden.flatten(0, 1), torch.ones(hidden.shape[:2], dtype=torch.bool)
        others[:, -1] = False
        out = hidden.new_empty(len(flat), 64)
        for part in (others.flatten(), ~others.flatten()):
            out[part] = dense(flat[part])
        return out.view(*hidden.shape[:2], -1)

    layer.forward = routed
    run_apart(made, tiny_bert, caplog, *more)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["dropout", "bias_all", "pissa_dropout", "eva", "micro_batches", "modules_to_save"])
def test_checkpoint_of_a_packed_trial_goes_on_alone_and_the_other_way_round(tiny_bert, double, tmp_path, option):
    spec = spec_of("seq_cls", tiny_bert, *OPTIONS[option], "train.max_steps=6")
    other = spec_of("seq_cls", tiny_bert, *PLAIN, "train.max_steps=9")
    work = workload_of("seq_cls", tiny_bert)
    whole = alone(spec, work, 7)

    def stopped(jobs: list[engine.Job], width: int, path: Path) -> list[float]:
        made, losses = trainer(spec, work), []
        made.width = width
        events = made.run(lambda: jobs.pop(0) if jobs else None)
        for event in events:
            if isinstance(event, engine.StepEvent) and event.number == 7:
                losses.append(event.loss)
                if event.step == 3:
                    made.checkpoint(7, path, {"tokens": 1})
                    events.close()
        assert made.slots == []
        return losses

    packed_first = stopped([engine.Job(1, other), engine.Job(7, spec)], 2, tmp_path / "a.pt")
    rest = alone(spec, work, 7, checkpoint=tmp_path / "a.pt")
    assert packed_first + rest.losses == pytest.approx(whole.losses, rel=EXACT)
    alone_first = stopped([engine.Job(7, spec)], 1, tmp_path / "b.pt")
    jobs = [engine.Job(1, other), engine.Job(7, spec, checkpoint=tmp_path / "b.pt")]
    found = run(trainer(spec, work), jobs, 2)[7]
    assert alone_first + found.losses == pytest.approx(whole.losses, rel=EXACT)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(found.tensors[name], tensor, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(rest.tensors[name], tensor, rtol=EXACT, atol=EXACT)


# --- who shares a pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "cost", "most", "expected"),
    [
        ([(2, 10), (2, 10), (2, 11)], 100, 64, [[0, 1, 2]]),
        ([(8, 10), (8, 100), (8, 12)], 100, 64, [[0, 2], [1]]),
        ([(8, 10), (8, 100), (8, 12)], 0, 64, [[0], [2], [1]]),
        ([(8, 10), (8, 100), (8, 12)], float("inf"), 64, [[0, 2, 1]]),
        ([(1, 5)] * 4, float("inf"), 2, [[0, 1], [2, 3]]),
    ],
)
def test_steps_share_a_pass_where_that_costs_less_than_the_padding(steps, cost, most, expected):
    assert pass_cost.passes(steps, cost, most) == expected


def test_few_slots_where_a_trial_fills_the_machine_and_more_where_it_does_not(tiny_bert):
    examples = workload_of("seq_cls", tiny_bert).examples["train"]
    train = spec_of("seq_cls", tiny_bert).train
    tokens = 4 * sum(map(len, examples)) / len(examples)
    assert pass_cost.width(0.1 * tokens, train, examples) == 1
    assert 4 <= pass_cost.width(0.22 * tokens, train, examples) <= 6
    assert (
        pass_cost.width(0.5 * tokens, train, examples)
        == pass_cost.width(float("inf"), train, examples)
        == pass_cost.MOST
    )


def part(module: torch.nn.Linear, rank: int, rows: slice) -> packed_pass.Part:
    """Return a trial that adapts a module with a rank, as far as its place in a pass goes."""
    update = fused_linear.Update(
        torch.empty(rank, module.in_features), torch.empty(module.out_features, rank), s=1.0, p=0.0
    )
    return packed_pass.Part(
        packed_pass.Layers(dropout.DropoutStream(torch.device("cpu")), plain={module: update}), rows, {}
    )


@pytest.mark.parametrize(
    ("ranks", "rows", "expected"),
    [
        ([4, 4, 8, 128], [2, 2, 2, 2], [[4, 4, 8], [128]]),
        ([64, 128], [2, 2], [[64], [128]]),
        ([8, 8, 8], [2, 2, 3], [[8, 8], [8]]),
    ],
)
def test_updates_are_stacked_where_rows_are_equal_and_padding_costs_little(ranks, rows, expected):
    module, ends = torch.nn.Linear(384, 384), [0, *itertools.accumulate(rows)]
    parts = [part(module, r, slice(*ends[i : i + 2])) for i, r in enumerate(ranks)]
    stacks = packed_pass.Pass(parts)._stacks(module)
    assert [[len(p.layers.plain[module].A_RI) for p in stack] for stack in stacks] == expected


def test_module_that_no_trial_adapts_computes_as_before():
    adapted, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    with packed_pass.Pass([part(adapted, 2, slice(0, 1)), part(adapted, 2, slice(1, 2))]).on():
        assert "forward" in vars(adapted) and "forward" not in vars(other)
    assert "forward" not in vars(adapted)


def test_trial_leaves_no_tensor_behind(tiny_bert):
    """The tensors that are alive after the 12th trial are as many as after the 2nd."""
    spec = spec_of("seq_cls", tiny_bert, "train.max_steps=2", "lora.lora_dropout=0.1")
    made, alive = trainer(spec, workload_of("seq_cls", tiny_bert)), []
    made.width, jobs = 1, [engine.Job(i, spec) for i in reversed(range(13))]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialBegan):
            gc.collect()
            alive.append(len(tensors()))
    assert len(set(alive[2:])) == 1, alive


def test_faster_way_is_found_on_the_trials_own_steps():
    found, costs = pass_cost.Comparison(), {True: 3.0, False: 2.0}
    ways = []
    for _ in range(10):
        ways.append(found.together((1, 2)))
        found.took(ways[-1], costs[ways[-1]], 1)
    assert ways == [True, False] * pass_cost.ROUNDS + [False] * 4
    assert found.together((1, 3)), "other trials are timed anew"


def test_trials_that_are_compared_end_as_they_would_alone(tiny_bert, double):
    specs = [spec_of("seq_cls", tiny_bert, "train.max_steps=9", *one) for one in (PLAIN, DROPPED)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)
    made._comparison = pass_cost.Comparison()
    made._comparison.took = lambda together, *cost: pass_cost.Comparison.took(
        made._comparison, together, 1 + together, 1
    )
    found = run(made, [engine.Job(i, spec) for i, spec in enumerate(specs)], 2)
    for i, spec in enumerate(specs):
        close(found[i], alone(spec, work, i), EXACT)


# --- a whole study ----------------------------------------------------------------------------------------------------


def test_study_ends_the_same_packed_and_solo(tiny_bert, tmp_path, capsys):
    """Eight trials through the command: the same winner, and metrics within 1e-3."""
    given = ["-m", "lora.r=2,4,8,16", "train.learning_rate=1e-3,2e-2", f"model.pretrained={tiny_bert}"]
    given += ["data.max_train_samples=60", "data.max_eval_samples=40", "data.max_tokens=24"]
    given += ["train.max_steps=12", "train.batch_size=4", f"outputs={tmp_path}", "tracking.reload_check=false"]
    values, needs = {}, {}
    for slots in (1, 4):
        capsys.readouterr()
        assert main.main([*given, f"train.slots={slots}", f"study=s{slots}"]) == 0
        results = [json.loads((tmp_path / f"s{slots}" / str(i) / "result.json").read_text()) for i in range(8)]
        assert all(r["wall_s"] >= r["train_s"] + r["eval_s"] > 0 for r in results)
        needs[slots] = [r["peak_gib"] for r in results]
        values[slots] = [(r["metric"]["value"], r["metrics"]["loss"]) for r in results]
        (best,) = re.findall(r"^(Trial \d \(.*?\)) is best\b", capsys.readouterr().out, re.MULTILINE)
        values[slots].append((best,))
    assert values[1].pop() == values[4].pop()
    assert needs[4] == pytest.approx(needs[1], rel=0.02), "what a trial needs by itself, whoever was beside it"
    assert [m for _, m in values[4]] == pytest.approx([m for _, m in values[1]], abs=1e-3)
    assert [m for m, _ in values[4]] == pytest.approx([m for m, _ in values[1]], abs=1e-3)


class Positioned(torch.nn.Module):
    """A model whose block is given a table of positions, [T, D], beside the rows."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.randn(3))

        def forward(self, x_BTD: torch.Tensor, table_TD: torch.Tensor, pair: tuple) -> torch.Tensor:
            return self.scale * x_BTD + table_TD + pair[0] + pair[1]

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block = torch.nn.Embedding(9, 3), self.Block()
        self.table_TD = torch.randn(8, 3)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        table_TD, x_BTD = self.table_TD[: input_ids.shape[1]], self.words(input_ids)
        return self.block(x_BTD, table_TD, pair=(x_BTD, table_TD))


@pytest.mark.parametrize("length", [2, 4, 8])
def test_a_table_as_long_as_the_batch_is_not_shared_out(length):
    """Not by its size, whatever that is, but by what was seen to grow with the rows."""
    torch.manual_seed(0)
    model, own = Positioned().eval(), [Positioned.Block(), Positioned.Block()]
    holders = row_order.holders(model, {"input_ids": torch.ones(1, length, dtype=torch.long)})
    expected = {(0, 0): True, (0, 1): False, (1, "pair", 0): True, (1, "pair", 1): False}
    assert holders[model.block] == expected
    ids_BT = torch.randint(0, 9, (4, length))
    stream = dropout.DropoutStream(torch.device("cpu"))
    parts = [
        packed_pass.Part(packed_pass.Layers(stream, whole={model.block: one}), slice(2 * i, 2 * i + 2), {})
        for i, one in enumerate(own)
    ]
    with torch.no_grad():
        with packed_pass.Pass(parts, holders).on():
            found = model(ids_BT)
        for i, one in enumerate(own):
            model.block = one
            assert torch.equal(found[2 * i : 2 * i + 2], model(ids_BT[2 * i : 2 * i + 2]))


def test_model_may_change_in_place_what_a_packed_layer_gives(tmp_path):
    """Longformer divides its queries in place."""
    config = transformers.LongformerConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=256,
        attention_window=[16],
    )
    folder = saved(config, transformers.AutoModel, tmp_path)
    specs = [spec_of("seq_cls", folder, *one) for one in ((), ("train.seed=5",))]
    work, jobs = workload_of("seq_cls", folder), [engine.Job(i, spec) for i, spec in enumerate(specs)]
    found = run(trainer(specs[0], work), jobs, 2)
    for job in jobs:
        assert found[job.number].losses == pytest.approx(alone(job.spec, work, job.number).losses, rel=1e-4)

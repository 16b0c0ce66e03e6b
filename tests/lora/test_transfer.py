"""A trial that starts from another's adapter: its update goes over, whatever the ranks and the scales."""

from pathlib import Path

import pytest
import torch
import yaml
from support.adapters import logits, move, prepared

from lorasweep.errors import ConfigError
from lorasweep.lora import adapter, transfer
from lorasweep.training import engine


def left_by(folder: Path, target: Path, *overrides: str) -> torch.Tensor:
    """Save an adapter that has moved away from its start; return what the model with it gives."""
    spec, work, load = prepared(folder, *overrides)
    attached = adapter.attach(load(), spec.lora, spec.task_type, 0)
    move(attached)
    adapter.save(attached, target)
    return logits(attached.peft_model, work)


def taken_over(folder: Path, source: Path, *overrides: str) -> tuple[torch.Tensor, str, adapter.Attached]:
    spec, work, load = prepared(folder, *overrides)
    attached = adapter.attach(load(), spec.lora, spec.task_type, 7)
    note = transfer.take_over(attached, source)
    return logits(attached.peft_model, work), note, attached


SAME = {
    "same": ([], []),
    "larger rank": ([], ["lora.r=8"]),
    "other scale": ([], ["lora.lora_alpha=3", "lora.use_rslora=true"]),
    "rank pattern": (["lora.rank_pattern={query:2}", "lora.alpha_pattern={key:5}"], ["lora.r=6"]),
    "biases": (["lora.bias=all"], ["lora.bias=all", "lora.r=8"]),
    "lora_bias": (["lora.lora_bias=true"], ["lora.lora_bias=true", "lora.lora_alpha=3"]),
    "dora": (["lora.use_dora=true"], ["lora.use_dora=true", "lora.r=8"]),
    "plain to dora": ([], ["lora.use_dora=true", "lora.r=8"]),
    "plain to dora at another scale": (["lora.lora_alpha=3"], ["lora.use_dora=true", "lora.use_rslora=true"]),
    "plain to dora of pissa": ([], ["lora.use_dora=true", "lora.init_lora_weights=pissa", "lora.r=32"]),
    "pissa to dora": (["lora.init_lora_weights=pissa"], ["lora.use_dora=true", "lora.r=8"]),
    "dora of pissa to dora": (
        ["lora.use_dora=true", "lora.init_lora_weights=pissa"],
        ["lora.use_dora=true", "lora.r=8"],
    ),
    "word vectors to dora": (
        ["lora.target_modules=[query,word_embeddings]"],
        ["lora.target_modules=[query,word_embeddings]", "lora.use_dora=true"],
    ),
    "word vectors at another rank": (
        ["lora.target_modules=[query,word_embeddings]"],
        ["lora.target_modules=[query,word_embeddings]", "lora.r=8", "lora.use_rslora=true"],
    ),
    "random B": ([], ["lora.init_lora_weights=false", "lora.r=8"]),
    "pissa to plain": (["lora.init_lora_weights=pissa"], ["lora.r=8"]),
    "pissa to pissa": (["lora.init_lora_weights=pissa"], ["lora.init_lora_weights=pissa"]),
    "olora to olora": (
        ["lora.init_lora_weights=olora", "lora.use_rslora=true"],
        ["lora.init_lora_weights=olora", "lora.use_rslora=true"],
    ),
    "plain to all of pissa": ([], ["lora.init_lora_weights=pissa", "lora.r=32"]),
    "more modules": (["lora.target_modules=qv", "lora.bias=all"], ["lora.target_modules=all", "lora.bias=all"]),
}


@pytest.mark.parametrize("case", SAME)
def test_update_stays_the_same_where_there_is_room(tiny_bert, tmp_path, case):
    old, new = SAME[case]
    expected = left_by(tiny_bert, tmp_path, "lora.r=4", *old)
    found, note, _ = taken_over(tiny_bert, tmp_path, "lora.r=4", *new)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert "left out" not in note
    assert f"from {tmp_path}" in note


def test_all_ranks_can_learn_on(tiny_bert, tmp_path):
    left_by(tiny_bert, tmp_path, "lora.r=4", "lora.init_lora_weights=pissa")
    for more in (["lora.r=12"], ["lora.r=6", "lora.init_lora_weights=pissa"]):
        _, _, attached = taken_over(tiny_bert, tmp_path, *more)
        for layer in adapter.lora_layers(attached.peft_model):
            A_RI, B_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            assert bool(((A_RI.abs().sum(1) > 0) | (B_OR.abs().sum(0) > 0)).all())


def test_smaller_rank_takes_the_nearest_update(tiny_bert, tmp_path):
    left_by(tiny_bert, tmp_path / "old", "lora.r=8", "lora.lora_alpha=4")
    _, note, attached = taken_over(tiny_bert, tmp_path / "old", "lora.r=3", "lora.lora_alpha=9")
    spec, _, load = prepared(tiny_bert, "lora.r=8", "lora.lora_alpha=4")
    source = adapter.attach(load(), spec.lora, spec.task_type, 7)
    transfer.take_over(source, tmp_path / "old")
    pairs = zip(adapter.lora_layers(source.peft_model), adapter.lora_layers(attached.peft_model), strict=True)
    for old, new in pairs:
        exact, found = old.get_delta_weight("default"), new.get_delta_weight("default")
        U, S, Vt = torch.linalg.svd(exact)
        torch.testing.assert_close(found, U[:, :3] * S[:3] @ Vt[:3], rtol=1e-4, atol=1e-5)
    assert "left out" not in note


def test_what_does_not_fit_is_left_out_and_named(tiny_bert, tmp_path):
    left_by(tiny_bert, tmp_path, "lora.r=4", "lora.target_modules=qkvo", "lora.bias=all")
    _, note, _ = taken_over(tiny_bert, tmp_path, "lora.r=4", "lora.target_modules=qv")
    counted = note.split(" tensors")[0]
    assert counted.startswith("took ") and int(counted.split()[1]) < int(counted.split()[3])
    assert "left out: base_model.model." in note and note.endswith("...")


def test_source_without_an_adapter_is_refused(tiny_bert, tmp_path):
    spec, work, load = prepared(tiny_bert)
    made, jobs = engine.Engine(load(), work.task, work.prepared()), [engine.Job(0, spec, start_from=tmp_path)]
    with pytest.raises(ConfigError, match="there is no saved adapter"):
        next(made.run(lambda: jobs.pop() if jobs else None))
    assert not any("lora" in n for n, _ in made.base.model.named_modules())


def test_trial_begins_with_the_loss_that_the_other_ended_with(tiny_bert, tmp_path):
    spec, work, load = prepared(tiny_bert, "train.max_steps=6", "train.learning_rate=1e-2", "train.eval_every=6")
    made, jobs, evals, notes = engine.Engine(load(), work.task, work.prepared()), [], [], []
    again, _, _ = prepared(tiny_bert, "train.max_steps=1", "train.learning_rate=1e-9", "lora.r=12", "train.seed=4")
    made.width = 1
    jobs = [engine.Job(1, again, start_from=tmp_path), engine.Job(0, spec)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialBegan):
            notes.append(event.notes)
        if isinstance(event, engine.EvalEvent):
            evals.append(event.metrics["loss"])
        if isinstance(event, engine.TrialEnded):
            adapter.save(event.attached, tmp_path)
    assert notes[0] == () and notes[1][0].startswith("took ")
    assert evals[1] == pytest.approx(evals[0], rel=1e-5)
    assert not any("lora" in n for n, _ in made.base.model.named_modules())


def test_lengths_of_dora_that_plain_lora_cannot_hold_are_refused(tiny_bert, tmp_path):
    left_by(tiny_bert, tmp_path, "lora.use_dora=true")
    with pytest.raises(ConfigError, match=r"set lora\.use_dora=true"):
        taken_over(tiny_bert, tmp_path)


ROUNDED = ["lora.init_lora_weights=loftq", "lora.r=4"]
OTHER_BASE = {
    "loftq to plain": (ROUNDED, []),
    "plain to loftq": ([], ROUNDED),
    "other bits": (ROUNDED, [*ROUNDED, "lora.loftq_bits=8"]),
    "later rounds at another rank": ([*ROUNDED, "lora.loftq_iter=2"], [*ROUNDED, "lora.loftq_iter=2", "lora.r=8"]),
}


@pytest.mark.parametrize("case", OTHER_BASE)
def test_base_that_only_one_of_both_rounds_is_refused(tiny_bert, tmp_path, case):
    old, new = OTHER_BASE[case]
    left_by(tiny_bert, tmp_path / "adapter", *old)
    (giver, _, _), (taker, work, load) = prepared(tiny_bert, *old), prepared(tiny_bert, *new)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(giver.to_dict()))
    made, jobs = (
        engine.Engine(load(), work.task, work.prepared()),
        [engine.Job(0, taker, start_from=tmp_path / "adapter")],
    )
    with pytest.raises(ConfigError, match="rounded by loftq"):
        list(made.run(lambda: jobs.pop() if jobs else None))


def test_one_round_of_loftq_rounds_alike_at_every_rank(tiny_bert, tmp_path):
    expected = left_by(tiny_bert, tmp_path, *ROUNDED)
    found, _, _ = taken_over(tiny_bert, tmp_path, *ROUNDED, "lora.r=8")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

"""A trial that goes on from its checkpoint ends as if it had never stopped: equal losses, metrics and weights."""

import itertools
import logging
import math
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter, loftq
from lorasweep.models import base_model
from lorasweep.tasks import batches
from lorasweep.training import checkpoint, engine, slot, workload

SMALL = ["model.decoder=null", "data.max_train_samples=40", "data.max_eval_samples=6"]
SMALL += ["data.max_tokens=24"]
TRAIN = ["train.max_steps=7", "train.eval_every=3", "train.batch_size=8", "train.learning_rate=1e-2", "lora.r=4"]
TRAIN += ["train.weight_decay=0.1", "train.max_grad_norm=0.5", "train.warmup_ratio=0.3"]

OPTIONS = {
    "plain": [],
    "lora_dropout": ["lora.lora_dropout=0.3"],
    "base_dropout": ["model.base_dropout=true", "lora.lora_dropout=0.1"],
    "bias_all": ["lora.bias=all"],
    "bias_lora_only": ["lora.bias=lora_only"],
    "lora_bias": ["lora.lora_bias=true"],
    "modules_to_save": ["lora.target_modules=attention", "lora.modules_to_save=[layer.1.output.dense]"],
    "pissa": ["lora.init_lora_weights=pissa", "lora.bias=all"],
    "pissa_niter": ["lora.init_lora_weights=pissa_niter_2"],
    "olora": ["lora.init_lora_weights=olora"],
    "eva": ["lora.init_lora_weights=eva", "lora.lora_dropout=0.1"],
    "loftq": ["lora.init_lora_weights=loftq", "lora.loftq_bits=8", "lora.loftq_iter=2"],
    "loftq_nf4": ["lora.init_lora_weights=loftq"],
    "orthogonal": ["lora.init_lora_weights=orthogonal"],
    "random_B": ["lora.init_lora_weights=false"],
    "dora": ["lora.use_dora=true", "lora.lora_dropout=0.2"],
    "dora_olora": ["lora.use_dora=true", "lora.init_lora_weights=olora"],
    "loraplus": ["lora.loraplus_lr_ratio=16"],
    "rslora": ["lora.use_rslora=true", "train.lr_scheduler_type=cosine"],
    "micro_batches": ["train.micro_batch_size=3", "lora.lora_dropout=0.2"],
}


@dataclass
class Seen:
    """What a run showed."""

    began: engine.TrialBegan | None = None
    losses: dict[int, float] = field(default_factory=dict)
    evals: dict[int, engine.EvalEvent] = field(default_factory=dict)
    ended: engine.TrialEnded | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    saved: dict[str, torch.Tensor] = field(default_factory=dict)
    """The adapter in peft's format."""


@cache
def workload_of(task: str, folder: Path) -> workload.Workload:
    return workload.workload(spec_of(task, folder))


@cache
def spec_of(task: str, folder: Path, *more: str):
    own = [f"task_type={task}", f"model.pretrained={folder}", *SMALL, *TRAIN]
    own += [f"model.decoder={folder}"] if task == "seq_2_seq_lm" else []  # with new cross-attention, trained in full
    return compose.compose_trial([*own, *more])


def trainer(spec, work) -> engine.Engine:
    """Return an engine on a base loaded afresh, as another process would have it."""
    torch.manual_seed(int.from_bytes(os.urandom(4)))
    return engine.Engine(base_model.load(spec.model, spec.train, work.task, work.tokenizer), work.task, work.prepared())


def run(made: engine.Engine, job: engine.Job, stop=lambda event: False, path: Path | None = None) -> Seen:
    """Run one trial; write its checkpoint to `path` and leave it where `stop` says so."""
    jobs, seen = [job], Seen()
    events = made.run(lambda: jobs.pop() if jobs else None)
    for event in events:
        match event:
            case engine.TrialBegan():
                seen.began = event
            case engine.StepEvent():
                seen.losses[event.step] = event.loss
            case engine.EvalEvent():
                seen.evals[event.step] = event
            case engine.TrialEnded():
                seen.ended = event
                seen.tensors = checkpoint.copied(event.attached.trained())
                seen.saved = checkpoint.copied(adapter.tensors(event.attached)) | event.attached.initial
        if stop(event):
            step = made.checkpoint(job.number, path, {"tokens": 5, "more": {"a": [1.5, "b"]}})
            assert step == (0 if isinstance(event, engine.TrialBegan) else event.step)
            events.close()
    return seen


def same(found: Any, expected: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[k], expected[k]) for k in expected)
    if isinstance(expected, list | tuple):
        return type(found) is type(expected) and all(same(f, e) for f, e in zip(found, expected, strict=True))
    return type(found) is type(expected) and found == expected


def check_resumed(before: Seen, after: Seen, whole: Seen) -> None:
    """Compare an interrupted run's two parts with the run that was left alone."""
    assert after.began is not None and after.ended is not None and whole.ended is not None
    assert before.losses | after.losses == whole.losses
    assert not before.losses.keys() & after.losses.keys() and not before.evals.keys() & after.evals.keys()
    evals = before.evals | after.evals
    assert evals.keys() == whole.evals.keys()
    for step, event in whole.evals.items():
        assert (evals[step].epoch, evals[step].metrics) == (event.epoch, event.metrics)
        assert same(evals[step].predictions, event.predictions)
    assert same(after.tensors, whole.tensors)
    assert same(after.saved, whole.saved)
    assert (after.ended.state, after.ended.step) == (whole.ended.state, whole.ended.step)


def after_step(step: int):
    return lambda event: isinstance(event, engine.StepEvent) and event.step == step


def after_eval(step: int):
    return lambda event: isinstance(event, engine.EvalEvent) and event.step == step


def check_resume(task: str, folder: Path, path: Path, stop, *more: str) -> Seen:
    spec, work = spec_of(task, folder, *more), workload_of(task, folder)
    whole = run(trainer(spec, work), engine.Job(3, spec))
    made = trainer(spec, work)
    base = {n: w.clone() for n, w in made.base.model.state_dict().items() if n not in made.base.missing}
    before = run(made, engine.Job(3, spec, checkpoint=path), stop, path)
    heads = tuple(f"{m}." for m in made.base.missing)  # drawn anew by every trial
    left = made.base.model.state_dict()
    assert all(torch.equal(left[n], w) for n, w in base.items() if not n.startswith(heads))
    after = run(trainer(spec, work), engine.Job(3, spec, checkpoint=path))
    check_resumed(before, after, whole)
    assert after.began.carried == {"tokens": 5, "more": {"a": [1.5, "b"]}}
    return after


@pytest.mark.parametrize("option", OPTIONS)
def test_resumed_trial_equals_the_uninterrupted_one(tiny_bert, tmp_path, option):
    """Five steps an epoch: the cut is in the second one, after an evaluation."""
    after = check_resume("seq_cls", tiny_bert, tmp_path / "c.pt", after_step(4), *OPTIONS[option])
    assert after.began.step == 4 and after.began.last.step == 3


@pytest.mark.parametrize("task", ["causal_lm", "seq_2_seq_lm", "token_cls", "question_ans", "feature_extraction"])
def test_every_task_resumes_with_its_predictions(tiny_bert, tiny_llama, tmp_path, task):
    folder = tiny_llama if task == "causal_lm" else tiny_bert
    more = ["lora.bias=none"] if task == "causal_lm" else ["lora.bias=all"]
    after = check_resume(task, folder, tmp_path / "c.pt", after_eval(3), *OPTIONS["base_dropout"], *more)
    assert after.began.last.predictions


CUTS = {
    "at the beginning": (lambda event: isinstance(event, engine.TrialBegan), 0, set()),
    "in the first epoch": (after_step(2), 2, {3, 6, 7}),
    "before an evaluation": (after_step(3), 3, {3, 6, 7}),
    "after an evaluation": (after_eval(3), 3, {6, 7}),
    "at the end of an epoch": (after_step(5), 5, {6, 7}),
    "before the last evaluation": (after_step(7), 7, {7}),
    "after the last evaluation": (after_eval(7), 7, set()),
    "at the end": (lambda event: isinstance(event, engine.TrialEnded), 7, set()),
}


@pytest.mark.parametrize("step", [2, 4, 5, 7])
def test_best_evaluation_survives_a_resume(tiny_bert, tmp_path, step):
    more = ["task_type.primary=loss", "train.eval_every=1", "train.learning_rate=0.3", "train.patience=4"]
    spec = spec_of("seq_cls", tiny_bert, *more)
    seen = run(trainer(spec, workload_of("seq_cls", tiny_bert)), engine.Job(3, spec))
    assert seen.ended is not None and seen.ended.kept is not None and seen.ended.kept.step < seen.ended.step
    check_resume("seq_cls", tiny_bert, tmp_path / "a.pt", after_eval(min(step, seen.ended.step)), *more)


@pytest.mark.parametrize("cut", CUTS)
def test_checkpoint_fits_between_any_two_events(tiny_bert, tmp_path, cut):
    stop, step, evals = CUTS[cut]
    spec, work, path = (
        spec_of("seq_cls", tiny_bert, *OPTIONS["lora_dropout"]),
        workload_of("seq_cls", tiny_bert),
        tmp_path / "c.pt",
    )
    whole = run(trainer(spec, work), engine.Job(3, spec))
    before = run(trainer(spec, work), engine.Job(3, spec), stop, path)
    after = run(trainer(spec, work), engine.Job(3, spec, checkpoint=path))
    check_resumed(before, after, whole)
    assert after.began.step == step
    assert after.evals.keys() == evals or step == 0
    if step == 7 and not evals:
        assert after.began.last.metrics == whole.evals[7].metrics
        assert same(after.began.last.predictions, whole.evals[7].predictions)


def test_trial_may_stop_many_times(tiny_bert, tmp_path):
    more = OPTIONS["base_dropout"]
    spec, work, path = spec_of("seq_cls", tiny_bert, *more), workload_of("seq_cls", tiny_bert), tmp_path / "c.pt"
    whole = run(trainer(spec, work), engine.Job(3, spec))
    losses, seconds, made = {}, [], trainer(spec, work)
    for step in range(1, 8):
        seen = run(made, engine.Job(3, spec, checkpoint=path), after_step(step), path)
        losses |= seen.losses
        seconds.append(torch.load(path)["train_s"])
    assert losses == whole.losses
    assert seconds == sorted(seconds)
    last = run(made, engine.Job(3, spec, checkpoint=path))
    assert same(last.tensors, whole.tensors)
    assert last.ended.train_s == seconds[-1]


@pytest.mark.parametrize("batch_size", [1, 8, 7, 40, 64])
@pytest.mark.parametrize("skip", [0, 1, 5, 6, 13])
def test_skipped_batches_are_those_that_would_have_come(tiny_bert, batch_size, skip):
    examples = workload_of("seq_cls", tiny_bert).examples["train"]
    whole = batches.epochs(examples, batch_size, seed=4)
    expected = [[e.row for e in b] for b in itertools.islice(whole, skip, skip + 8)]
    found = itertools.islice(batches.epochs(examples, batch_size, seed=4, skip=skip), 8)
    assert [[e.row for e in b] for b in found] == expected


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tiny_bert, tmp_path_factory) -> Path:
    """Return a checkpoint of step 4."""
    path = tmp_path_factory.mktemp("written") / "c.pt"
    spec = spec_of("seq_cls", tiny_bert)
    run(trainer(spec, workload_of("seq_cls", tiny_bert)), engine.Job(3, spec), after_step(4), path)
    return path


@pytest.mark.parametrize("fault", ["save", "fsync", "replace"])
def test_failed_write_leaves_the_old_checkpoint(tiny_bert, tmp_path, monkeypatch, fault):
    spec, work, path = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert), tmp_path / "c.pt"
    made, jobs = trainer(spec, work), [engine.Job(3, spec)]
    steps = (e for e in made.run(lambda: jobs.pop() if jobs else None) if isinstance(e, engine.StepEvent))
    next(steps)
    assert made.checkpoint(3, path, {}) == 1
    old = path.read_bytes()
    next(steps)

    def fails(*args: Any) -> None:
        if fault == "save":
            args[1].write(b"half a file")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch if fault == "save" else os, fault, fails)
        with pytest.raises(OSError, match="No space"):
            made.checkpoint(3, path, {})
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]
    next(steps)
    assert made.checkpoint(3, path, {}) == 3


def damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "cut short": content[:middle],
        "empty": b"",
        "another file": b"something else",
        "a bit flipped": content[:middle]
        + bytes(b ^ 1 for b in content[middle : middle + 256])
        + content[middle + 256 :],
    }[how]


@pytest.mark.parametrize("how", ["cut short", "empty", "another file", "a bit flipped"])
def test_damaged_checkpoint_starts_afresh_with_a_warning(tiny_bert, tmp_path, caplog, written, how):
    path = tmp_path / "c.pt"
    path.write_bytes(damaged(written.read_bytes(), how))
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    with caplog.at_level(logging.WARNING, "lorasweep.training.checkpoint"):
        seen = run(trainer(spec, work), engine.Job(3, spec, checkpoint=path))
    assert seen.began.step == 0 and seen.began.carried == {} and len(seen.losses) == 7
    assert "cannot be read, the trial starts afresh" in caplog.text


def test_file_of_another_layout_starts_afresh(tiny_bert, tmp_path, caplog, monkeypatch, written):
    spec = spec_of("seq_cls", tiny_bert)
    old = checkpoint.VERSION
    monkeypatch.setattr(checkpoint, "VERSION", 99)
    assert checkpoint.read(written, checkpoint.identity(3, spec, 40)) is None
    assert f"version {old}, not 99" in caplog.text


def test_checkpoint_runs_no_code(tmp_path, caplog):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"version": checkpoint.VERSION, "identity": Evil()}, tmp_path / "c.pt")
    assert checkpoint.read(tmp_path / "c.pt", {}) is None
    assert not (tmp_path / "made").exists()


def test_leftovers_of_a_dead_writer_are_removed(tmp_path):
    left, other = tmp_path / "c.pt.123.part", tmp_path / "d.pt"
    left.write_bytes(b"half")
    other.write_bytes(b"whole")
    assert checkpoint.read(tmp_path / "c.pt", {}) is None
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("number", "more", "words"),
    [
        (4, [], "number: the checkpoint was written with 3, the trial has 4"),
        (3, ["train.learning_rate=0.02"], "train.learning_rate: the checkpoint was written with 0.01"),
        (3, ["lora.r=8", "train.seed=1"], "2 problems"),
    ],
)
def test_checkpoint_of_another_trial_is_refused(tiny_bert, written, number, more, words):
    spec, work = spec_of("seq_cls", tiny_bert, *more), workload_of("seq_cls", tiny_bert)
    made = trainer(spec, work)
    with pytest.raises(ConfigError, match=words):
        run(made, engine.Job(number, spec, checkpoint=written))
    assert made.slots == []
    assert not any("lora" in n for n, _ in made.base.model.named_modules())


def test_only_plain_data_is_carried(tiny_bert, tmp_path):
    numpy = pytest.importorskip("numpy")
    found = checkpoint.plain({"a": numpy.float64(1.5), "b": (True, None, "c"), 3: [torch.ones(2)]})
    assert type(found["a"]) is float and found["b"] == (True, None, "c") and same(found[3], [torch.ones(2)])
    with pytest.raises(TypeError, match="and tensors, got "):
        checkpoint.plain({"path": tmp_path})


# --- the base under PiSSA, OLoRA and LoftQ ---------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa_niter_1", "olora"])
def test_base_follows_the_stored_start_where_the_decomposition_differs(tiny_bert, init):
    spec = spec_of("seq_cls", tiny_bert, f"lora.init_lora_weights={init}")
    made = trainer(spec, workload_of("seq_cls", tiny_bert))

    def residuals(attached: adapter.Attached) -> list[torch.Tensor]:
        return [layer.get_base_layer().weight.clone() for layer in adapter.lora_layers(attached.peft_model)]

    attached = adapter.attach(made.base, spec.lora, spec.task_type, seed=0)
    first = residuals(attached)
    initial = {n: w.clone() for n, w in attached.initial.items()}
    adapter.detach(attached)
    other = adapter.attach(made.base, spec.lora, spec.task_type, seed=1)
    if init == "olora":  # it draws nothing: another machine may turn a vector round
        flipped = {n: -w for n, w in other.initial.items()}
        adapter.begin_from(other, {n: w + 0.1 for n, w in flipped.items()})
    assert not same(residuals(other), first)
    adapter.begin_from(other, initial)
    assert same(residuals(other), first)
    assert same(other.initial, initial)
    adapter.detach(other)


def test_other_quantised_base_starts_afresh(tiny_bert, tmp_path, monkeypatch, caplog):
    spec, work = spec_of("seq_cls", tiny_bert, *OPTIONS["loftq"]), workload_of("seq_cls", tiny_bert)
    path = tmp_path / "c.pt"
    run(trainer(spec, work), engine.Job(3, spec), after_step(4), path)
    rounded = loftq.rounded
    monkeypatch.setattr(loftq, "rounded", lambda *args: rounded(*args) * 1.0001)
    assert run(trainer(spec, work), engine.Job(3, spec, checkpoint=path)).began.step == 0
    assert "came out otherwise" in caplog.text


# --- evaluations and limits ------------------------------------------------------------------------------------------


def test_evaluates_after_the_given_steps_too(tiny_bert):
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    seen = run(trainer(spec, work), engine.Job(0, spec, eval_steps=frozenset({1, 3, 4, 50})))
    assert list(seen.evals) == [1, 3, 4, 6, 7]


def test_pruned_trial_stays_pruned_after_a_resume(tiny_bert, tmp_path):
    spec, work, path = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert), tmp_path / "c.pt"
    made = trainer(spec, work)

    def stop(event: engine.Event) -> bool:
        if isinstance(event, engine.StepEvent) and event.step == 3:
            made.prune(3, "enough")
            return True
        return False

    run(made, engine.Job(3, spec), stop, path)
    after = run(made, engine.Job(3, spec, checkpoint=path))
    assert after.losses == {} and list(after.evals) == [3]
    assert (after.ended.state, after.ended.reason) == ("PRUNED", "enough")


def test_prune_at_the_beginning_takes_no_step(tiny_bert):
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    made, jobs = trainer(spec, work), [engine.Job(0, spec)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialBegan):
            made.prune(0, "no need")
    assert (event.state, event.step) == ("PRUNED", 0)


def reasons(losses: list[float], ratio: float | None = 10.0) -> list[str]:
    limit = slot.LossLimit()
    return [limit.reason(loss, ratio) for loss in losses]


def test_loss_far_over_its_start_for_long_ends_a_trial():
    start = [0.6, 0.65, 0.7, 0.75, 0.75]
    found = reasons([*start, *[12.34] * 20])
    assert found[:-1] == [""] * 24
    assert found[-1] == "the loss stayed over 10 times its start (0.69) for 20 steps; last 12.3"


@pytest.mark.parametrize(
    ("losses", "ratio"),
    [
        ([0.7] * 5 + [12.0] * 100, None),
        ([0.7] * 5 + ([12.0] * 19 + [6.9]) * 4, 10.0),
        ([1e-4] * 5 + [0.09] * 100, 10.0),
        ([50.0] * 4, 10.0),
    ],
    ids=["off", "it comes back", "a start near zero", "short"],
)
def test_loss_limit_waits(losses, ratio):
    assert not any(reasons(losses, ratio))


def test_diverging_trial_ends_pruned_at_the_same_step_after_a_resume(tiny_bert, tmp_path, monkeypatch):
    spec = spec_of("seq_cls", tiny_bert, "train.max_steps=40", "train.max_loss_ratio=3", "train.eval_every=100")
    work, path = workload_of("seq_cls", tiny_bert), tmp_path / "c.pt"
    step = engine.Engine._update
    losses = type(work.task).row_losses

    def update(self, slot, rate, norm):
        self.boost = 1.0 if slot.step < 7 else 8.0
        step(self, slot, rate, norm)

    def grown(task, net, batch):
        return losses(task, net, batch) * boost()

    def boost() -> float:
        return getattr(made, "boost", 1.0)

    monkeypatch.setattr(engine.Engine, "_update", update)
    monkeypatch.setattr(type(work.task), "row_losses", grown)
    made = trainer(spec, work)
    whole = run(made, engine.Job(3, spec))
    assert whole.ended.state == "PRUNED" and "the loss stayed over 3 times its start" in whole.ended.reason
    assert whole.ended.step == 28 and math.isfinite(whole.losses[28])
    made = trainer(spec, work)
    run(made, engine.Job(3, spec), after_step(15), path)
    after = run(made, engine.Job(3, spec, checkpoint=path))
    assert (after.ended.step, after.ended.reason) == (28, whole.ended.reason)

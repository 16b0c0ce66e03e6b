"""Out of memory: the step goes on in smaller passes with the same loss, and a trial that fits in none ends alone."""

import gc
import json
import logging

import pytest
import torch
from support.parity import DROPPED, EXACT, PLAIN, SMALL, alone, close, run, spec_of, tensors, trainer, workload_of

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.memory import out_of_memory
from lorasweep.models import base_model
from lorasweep.runner import rehearsal
from lorasweep.tasks.seq_cls import SeqCls
from lorasweep.training import engine

pytestmark = pytest.mark.usefixtures("always_together")

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]

AUTO = ("train.micro_batch_size=auto", "train.batch_size=8")


@pytest.fixture
def small_memory(monkeypatch):
    """Return a function that lets forward passes of more rows than it is told run out of memory, on their way back or
    there."""
    seen: list[int] = []

    def allow(rows: int, error: BaseException | None = None, in_backward: bool = False) -> list[int]:
        forward = SeqCls.row_losses
        pattern = error or ERRORS[0]

        def fail(*_):
            raise type(pattern)(*pattern.args)  # a new one: an error keeps the frames that it came through

        def limited(task, model, batch):
            seen.append(len(batch.rows))
            losses = forward(task, model, batch)
            if len(batch.rows) > rows and not in_backward:
                fail()
            if len(batch.rows) > rows:
                losses.register_hook(fail)
            return losses

        monkeypatch.setattr(SeqCls, "row_losses", limited)
        return seen

    return allow


def jobs(*specs) -> list[engine.Job]:
    return [engine.Job(i, spec) for i, spec in enumerate(specs)]


@pytest.mark.parametrize(
    ("error", "in_backward"),
    [(ERRORS[0], True), (ERRORS[1], False), (ERRORS[2], False), (ERRORS[3], True)],
    ids=["device", "python", "cpu", "cublas"],
)
def test_micro_batches_are_halved_and_the_losses_stay(tiny_bert, double, small_memory, error, in_backward):
    spec, work = spec_of("seq_cls", tiny_bert, *AUTO), workload_of("seq_cls", tiny_bert)
    expected = alone(spec, work)
    seen = small_memory(3, error, in_backward)
    made = trainer(spec, work)
    close(run(made, jobs(spec), 1)[0], expected, EXACT)
    assert made.limits.rows == 2 and seen[:3] == [8, 4, 2] and set(seen[3:]) == {2}, "and it is remembered"


def test_step_after_some_good_ones_is_done_again(tiny_bert, double, small_memory):
    """The third step's second micro batch fails: what it had added to the gradient is forgotten."""
    spec, work = spec_of("seq_cls", tiny_bert, *AUTO), workload_of("seq_cls", tiny_bert)
    expected = alone(spec, work)
    made = trainer(spec, work)
    made.limits.rows = 4
    forward, calls = SeqCls.row_losses, []

    def fails_once(task, model, batch):
        calls.append(len(batch.rows))
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(task, model, batch)

    made.task.row_losses = fails_once.__get__(made.task)
    try:
        close(run(made, jobs(spec), 1)[0], expected, EXACT)
    finally:
        del made.task.row_losses
    assert calls[4:8] == [4, 4, 2, 2] and made.limits.rows == 2


def test_fewer_trials_share_a_pass_before_their_batches_are_cut(tiny_bert, double, small_memory, caplog):
    specs = [spec_of("seq_cls", tiny_bert, *one, "train.batch_size=4") for one in ((), PLAIN, DROPPED, ("lora.r=2",))]
    work = workload_of("seq_cls", tiny_bert)
    expected = [alone(spec, work, i) for i, spec in enumerate(specs)]
    seen = small_memory(8)
    made = trainer(specs[0], work)
    found = run(made, jobs(*specs), 4)
    for i, one in enumerate(expected):
        close(found[i], one, EXACT)
    assert (made.limits.most, made.limits.rows) == (2, None)
    assert seen[0] == 16 and max(seen[1:]) == 8 and "at most 2 trials share a pass" in caplog.text


def test_both_where_one_is_not_enough(tiny_bert, double, small_memory):
    specs = [spec_of("seq_cls", tiny_bert, *AUTO, *one) for one in ((), ("lora.r=2",), ("train.seed=3",))]
    work = workload_of("seq_cls", tiny_bert)
    expected = [alone(spec, work, i) for i, spec in enumerate(specs)]
    small_memory(5)
    made = trainer(specs[0], work)
    found = run(made, jobs(*specs), 3)
    for i, one in enumerate(expected):
        close(found[i], one, EXACT)
    assert (made.limits.most, made.limits.rows) == (1, 4)


def test_trial_that_fits_in_no_way_fails_and_the_others_go_on(tiny_bert, double, small_memory):
    """Trial 1 may not divide its batch."""
    small, large = ("train.batch_size=2",), ("train.batch_size=8",)
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in (small, large, (*small, "lora.r=2"))]
    work = workload_of("seq_cls", tiny_bert)
    expected = {i: alone(specs[i], work, i) for i in (0, 2)}
    small_memory(6)
    made, reasons = trainer(specs[0], work), {}

    def act(event):
        if isinstance(event, engine.TrialEnded):
            reasons[event.number] = event.reason

    found = run(made, jobs(*specs), 3, act)
    assert found[1].state == "FAIL" and found[1].losses == []
    for i, one in expected.items():
        close(found[i], one, EXACT)
    assert "needs about" in reasons[1] and "with 8 rows a pass" in reasons[1] and "GiB, " in reasons[1]
    assert "train.micro_batch_size=auto" in reasons[1] and "data.max_tokens=12" in reasons[1]
    assert made.slots == [] and not any("lora" in n for n, _ in made.base.model.named_modules())


def test_trial_that_does_not_fit_at_one_row_says_so(tiny_bert, small_memory):
    spec, work = spec_of("seq_cls", tiny_bert, *AUTO), workload_of("seq_cls", tiny_bert)
    small_memory(0)
    reasons = []
    act = lambda e: reasons.append(e.reason) if isinstance(e, engine.TrialEnded) else None  # noqa: E731
    assert run(trainer(spec, work), jobs(spec), 1, act)[0].state == "FAIL"
    assert "with 1 rows a pass" in reasons[0] and "micro_batch_size" not in reasons[0]


def test_evaluation_takes_smaller_batches(tiny_bert, monkeypatch, caplog):
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    expected = alone(spec, work)
    predict = SeqCls.predict

    def limited(task, model, batch):
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(task, model, batch)

    monkeypatch.setattr(SeqCls, "predict", limited)
    made = trainer(spec, work)
    found = run(made, jobs(spec), 1)[0]
    assert found.metrics == [pytest.approx(m, rel=1e-5) for m in expected.metrics]
    assert made.limits.eval_rows == 2 and "evaluation takes 2 rows" in caplog.text


def test_batches_whose_rows_need_each_other_are_not_divided(tiny_bert):
    assert workload_of("seq_cls", tiny_bert).task.divisible
    assert not workload_of("feature_extraction", tiny_bert).task.divisible


def test_keys_that_are_named_make_the_memory_less(tiny_bert, monkeypatch):
    """Rows that need each other are not divided: auto would change nothing."""
    spec, work = spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert)
    assert out_of_memory.keys(spec, 4, work.task)[0] == "train.micro_batch_size=auto"
    pairs = workload_of("feature_extraction", tiny_bert)
    assert out_of_memory.keys(spec, 4, pairs.task)[0] == "train.batch_size=2"
    assert "size" not in out_of_memory.keys(spec, 1, pairs.task)[0]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "model.device_map=auto" in out_of_memory.keys(spec, 4, work.task)
    spread = spec_of("seq_cls", tiny_bert, "model.device_map=auto")
    assert "model.device_map=auto" not in out_of_memory.keys(spread, 4, work.task)


def test_other_errors_are_no_lack_of_memory():
    with pytest.raises(RuntimeError, match="size"):
        out_of_memory.attempt(lambda: torch.ones(2) @ torch.ones(3))


def test_nothing_is_left_of_what_did_not_fit(tiny_bert, small_memory):
    """A failed trial, halved batches and a failed pass of several: no tensor stays alive."""
    fits = spec_of("seq_cls", tiny_bert, "train.max_steps=2", *AUTO)
    fails = spec_of("seq_cls", tiny_bert, "train.max_steps=2", "train.batch_size=8")
    work = workload_of("seq_cls", tiny_bert)
    small_memory(3)
    made, alive = trainer(fits, work), []
    made.width, todo = 1, [engine.Job(i, fails if i % 2 else fits) for i in reversed(range(8))]
    for event in made.run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.TrialBegan) and event.number % 2 == 0:
            gc.collect()
            alive.append(len(tensors()))
    assert len(alive) == 4 and len(set(alive[1:])) == 1, alive


def test_memory_of_a_failed_pass_is_free_before_the_next_one(tiny_bert, monkeypatch):
    """What the failed forward pass made is gone when the step is tried again."""
    spec, work = spec_of("seq_cls", tiny_bert, *AUTO), workload_of("seq_cls", tiny_bert)
    forward, alive = SeqCls.row_losses, []
    monkeypatch.setattr(logging.getLogger("lorasweep.memory.out_of_memory"), "disabled", True)

    def limited(task, model, batch):
        alive.append(sum(t.grad_fn is not None for t in tensors()))
        losses = forward(task, model, batch)
        if len(batch.rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses

    monkeypatch.setattr(SeqCls, "row_losses", limited)
    run(trainer(spec, work), jobs(spec), 1)
    assert set(alive[:3]) == {alive[0]}, alive


@pytest.mark.parametrize("word", ["auto", "3", "null"])
def test_micro_batch_size_is_a_number_null_or_auto(word):
    spec = compose.compose_trial([f"train.micro_batch_size={word}"])
    assert spec.train.rows == (3 if word == "3" else spec.train.batch_size)
    with pytest.raises(Exception, match="must be auto or a number from 1, got 'car'"):
        compose.compose_trial(["train.micro_batch_size=car"])


def test_worker_goes_on_after_a_trial_that_does_not_fit(tiny_bert, tmp_path, small_memory, capsys):
    small_memory(4)
    own = [f"model.pretrained={tiny_bert}", *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]
    own.remove("train.batch_size=4")
    assert main.main(["-m", "train.batch_size=8,4", *own]) == 3
    results = [json.loads((tmp_path / "s" / n / "result.json").read_text()) for n in "01"]
    assert [r["state"] for r in results] == ["FAIL", "COMPLETE"]
    assert results[0]["reason"].startswith("out of memory: it needs about")
    assert "FAIL (out of memory" in capsys.readouterr().out


@pytest.fixture
def unrehearsed(monkeypatch):
    """Let the study be made, as on a machine that the rehearsal fits: only the worker meets what is wrong."""
    monkeypatch.setattr(rehearsal, "rehearse", lambda *_: [])


@pytest.mark.usefixtures("unrehearsed")
def test_trial_that_its_machine_refuses_fails_with_all_problems_in_one_line(tiny_bert, tmp_path, monkeypatch):
    def refuse(*_):
        raise ConfigError(["train.device: first", "model.quantization: second"])

    monkeypatch.setattr(base_model, "load", refuse)
    own = [f"model.pretrained={tiny_bert}", *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]
    assert main.main(own) == 3
    result = json.loads((tmp_path / "s" / "0" / "result.json").read_text())
    assert result["reason"] == "train.device: first; model.quantization: second"


@pytest.mark.usefixtures("unrehearsed")
def test_base_that_does_not_fit_fails_its_trial_with_the_estimate(tiny_bert, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(base_model, "load", full)
    own = [f"model.pretrained={tiny_bert}", *SMALL, "tracking=none", f"outputs={tmp_path}", "study=s"]
    assert main.main(own) == 3
    result = json.loads((tmp_path / "s" / "0" / "result.json").read_text())
    assert result["state"] == "FAIL" and result["reason"].startswith("out of memory: it needs about")
    assert "torch.OutOfMemoryError" in result["traceback"]

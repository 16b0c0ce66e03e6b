"""An error ends the trial that it is of and no other; what is no trial's fault ends the worker."""

import errno
import weakref
from types import SimpleNamespace

import pytest
import torch

from lorasweep.errors import ConfigError, DiskFull, LostLease, StorageDown
from lorasweep.runner.failures import Failures, trace_of


class Endings:
    """Remembers what it was asked to end."""

    def __init__(self) -> None:
        self.ended: list[tuple[str, object, str]] = []

    def fail(self, running, error) -> None:
        self.ended.append(("fail", running, error))

    def fail_unopened(self, number, error) -> None:
        self.ended.append(("fail unopened", number, error))

    def drop(self, running, why) -> None:
        self.ended.append(("drop", running, why))


@pytest.fixture
def endings() -> Endings:
    return Endings()


@pytest.fixture
def failures(endings, tmp_path) -> Failures:
    return Failures(tmp_path, endings, lambda running: f"{running} needs 3 GiB")


def raised(block, error: BaseException) -> None:
    with block:
        raise error


def test_error_of_a_trial_ends_it_with_the_reason_last(failures, endings):
    raised(failures.of_trial("trial 3"), RuntimeError("out of luck"))
    ((kind, running, trace),) = endings.ended
    assert (kind, running) == ("fail", "trial 3")
    assert trace.startswith("Traceback") and trace.strip().splitlines()[-1] == "RuntimeError: out of luck"


def test_problem_of_a_setting_is_the_reason(failures, endings):
    raised(failures.of_trial("trial 3"), ConfigError(["lora.r: too large", "lora.bias: none"]))
    assert endings.ended[0][2].splitlines()[-1] == "lora.r: too large; lora.bias: none"


def test_trial_without_room_says_what_it_needs(failures, endings):
    raised(failures.of_trial("trial 3"), torch.OutOfMemoryError("CUDA out of memory"))
    assert endings.ended[0][2].splitlines()[-1] == "trial 3 needs 3 GiB"


def test_trial_that_another_worker_has_is_dropped(failures, endings):
    raised(failures.of_trial("trial 3"), LostLease("given away"))
    assert endings.ended == [("drop", "trial 3", "given away")]


def test_error_of_the_engine_ends_those_to_blame(failures, endings):
    raised(failures.of_engine(lambda: ["trial 1", "trial 2"]), ValueError("no"))
    assert [(kind, running) for kind, running, _ in endings.ended] == [("fail", "trial 1"), ("fail", "trial 2")]


def test_claimed_trial_that_cannot_be_opened_fails_by_its_number(failures, endings):
    raised(failures.of_claim(7), ValueError("no point is left"))
    assert endings.ended[0][:2] == ("fail unopened", 7)
    raised(failures.of_claim(8), LostLease("given away"))
    assert len(endings.ended) == 1


@pytest.mark.parametrize("block", ["of_trial", "of_claim", "of_engine"])
@pytest.mark.parametrize("error", [DiskFull("full"), StorageDown("gone"), OSError(errno.ENOSPC, "no space left")])
def test_what_is_no_trials_fault_ends_none(failures, endings, block, error):
    with pytest.raises((DiskFull, StorageDown)):
        raised(getattr(failures, block)(lambda: ["trial 1"]), error)
    assert endings.ended == []


def test_full_disk_behind_a_runtime_error_is_told_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(DiskFull, match=f"free space, then: python -m lorasweep resume {tmp_path}"):
        trace_of(RuntimeError("PytorchStreamWriter failed writing file"), tmp_path)


def test_secrets_are_not_in_the_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    assert "hf_abcdefgh" not in trace_of(RuntimeError("401 for hf_abcdefgh"), tmp_path)


@pytest.mark.parametrize("block", ["of_trial", "of_engine"])
def test_failed_trial_gives_back_what_its_step_held(failures, block):
    """Bytes that are alive before and after are equal, though the error came through a frame that held them."""
    held = []

    def step() -> None:
        activations = torch.ones(1000)
        held.append(weakref.ref(activations))
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as error:
            raise RuntimeError("the step failed") from error

    kept = []  # as a log handler or a debugger may keep the last error
    with getattr(failures, block)((lambda: ["trial 1"]) if block == "of_engine" else "trial 1"):
        try:
            step()
        except RuntimeError as error:
            kept.append(error)
            raise
    assert kept and held[0]() is None

"""What raises ends the trial that it is of, and no other. What is no trial's fault ends the worker."""

import errno
import shutil
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lorasweep.credentials import redact
from lorasweep.errors import ConfigError, DiskFull, LostLease, StorageDown
from lorasweep.memory import out_of_memory
from lorasweep.runner.endings import Endings
from lorasweep.runner.trial_run import Running

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
NO_SPACE_WORDS = (
    *("No space left on device", "Disk quota exceeded", "os error 28", "database or disk is full"),
    *("PytorchStreamWriter failed", "unexpected pos", "file write failed"),
)
"""How errors without a class for it say that the disk is full: safetensors', pyarrow's and SQLite's; torch's."""
FULL_DISK_BYTES = 2**20
"""With less room a disk is as good as full."""


class Failures:
    """Blocks whose errors end trials. DiskFull and StorageDown pass through: nothing is wrong with the trials."""

    def __init__(self, folder: Path, endings: Endings, too_large: Callable[[Running], str]) -> None:
        """`folder` is the study's; `too_large` says of a trial what it needs and what there is."""
        self._folder = folder
        self._endings = endings
        self._too_large = too_large

    @contextmanager
    def of_claim(self, number: int) -> Iterator[None]:
        """Fail a claimed trial whose point cannot be drawn or composed, or whose folder cannot be opened."""
        try:
            yield
        except LostLease:
            return
        except Exception as error:
            self._endings.fail_unopened(number, trace_of(error, self._folder))

    @contextmanager
    def of_trial(self, running: Running) -> Iterator[None]:
        """Fail a trial where something of it raises."""
        try:
            yield
        except LostLease as lost:
            self._endings.drop(running, str(lost))
        except Exception as error:
            self._fail(running, error)
            _let_go(error)
        else:
            return
        out_of_memory.free()

    @contextmanager
    def of_engine(self, blamed: Callable[[], Iterable[Running]]) -> Iterator[None]:
        """Fail the trials that are to blame where the engine raises."""
        try:
            yield
        except LostLease:
            return
        except Exception as error:
            for running in blamed():
                self._fail(running, error)
            _let_go(error)
        else:
            return
        out_of_memory.free()

    def _fail(self, running: Running, error: Exception) -> None:
        trace = trace_of(error, self._folder)
        if out_of_memory.is_out_of_memory(error):
            trace = f"{trace}\n{self._too_large(running)}"
        self._endings.fail(running, trace)


def _let_go(error: BaseException | None) -> None:
    """Let the frames that an error came through hold nothing any more: a step's tensors are among it."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def trace_of(error: Exception, folder: Path) -> str:
    """Return an error's traceback without secrets; its last line is the reason.

    Raises the error where it is no trial's fault, DiskFull where the disk of `folder` takes nothing more.
    """
    if isinstance(error, DiskFull | StorageDown):
        raise error
    if _is_of_the_disk(error, folder):
        said = (str(error).splitlines() or [type(error).__name__])[0]
        free = shutil.disk_usage(folder).free / 2**20
        raise DiskFull(
            f"{folder}: cannot write ({said}), {free:.1f} MiB are free there; free space, then: "
            f"python -m lorasweep resume {folder}"
        ) from error
    trace = redact("".join(traceback.format_exception(error)))
    if isinstance(error, ConfigError):
        trace = f"{trace}\n{redact('; '.join(error.problems))}"
    return trace


def _is_of_the_disk(error: Exception, folder: Path) -> bool:
    """Return whether an error, or what it was raised from, is the disk's. Libraries tell a full disk each in its way,
    and by then what was half written is gone and there is some room again.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in NO_SPACE:
            return True
        if any(words in str(cause) for words in NO_SPACE_WORDS):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < FULL_DISK_BYTES

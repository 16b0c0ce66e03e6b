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

    def _fail(self, running: Running, error: Exception) -> None:
        trace = trace_of(error, self._folder)
        if out_of_memory.is_out_of_memory(error):
            trace = f"{trace}\n{self._too_large(running)}"
        self._endings.fail(running, trace)


def trace_of(error: Exception, folder: Path) -> str:
    """Return an error's traceback without secrets; its last line is the reason.

    Raises the error where it is no trial's fault, DiskFull where the disk of `folder` takes nothing more.
    """
    if isinstance(error, DiskFull | StorageDown):
        raise error
    if _is_of_the_disk(error, folder):
        raise DiskFull(
            f"{folder}: cannot write ({error}); free space, then: python -m lorasweep resume {folder}"
        ) from error
    trace = redact("".join(traceback.format_exception(error)))
    if isinstance(error, ConfigError):
        trace = f"{trace}\n{redact('; '.join(error.problems))}"
    return trace


def _is_of_the_disk(error: Exception, folder: Path) -> bool:
    """Return whether an error is the disk's; torch tells a full disk as a RuntimeError of its own."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    return isinstance(error, OSError | RuntimeError) and shutil.disk_usage(folder).free < FULL_DISK_BYTES

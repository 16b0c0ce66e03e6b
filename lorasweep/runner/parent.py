"""A worker outlives the command that launched it only as long as it takes to save.

The command is looked for every second: Linux could send a signal at its death (PR_SET_PDEATHSIG), but does so at the
death of the thread that started the worker too, and joblib's threads end before their workers.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lorasweep.credentials import guard_stderr
from lorasweep.runner import interrupt
from lorasweep.study import lease
from lorasweep.study.lease import Owner

LOOK_EVERY_S = 1.0
MOST_S = 60.0
"""Longest that an orphan saves; then it ends as by a kill, and its trials go on from their last checkpoints."""

LOADING = 1
"""Blocks that listen in a worker that has not begun to run trials: nothing is to be saved yet."""

_idle = threading.Event()
_watched: set[int] = set()
"""Processes that this one has a thread for."""


def work(folder: str, divide: bool, trusted: bool, launcher: Owner, config: object) -> None:
    """What a launcher runs in each worker's process. It listens to signals before it loads what trains."""
    if launcher.pid != os.getpid():
        guard_stderr()
    with followed(launcher), interrupt.heard():
        from lorasweep.runner import worker

        worker.run_worker(folder, divide, trusted)
    interrupt.hand_on()


@contextmanager
def followed(launcher: Owner) -> Iterator[None]:
    """Stop the block's work as SIGTERM does when the launcher has died, then end this process.

    A process that waits for more work after the block ends with its launcher, too. Jobs of SLURM are SLURM's: they go
    on.
    """
    if (
        launcher.pid == os.getpid()
        or not lease.is_here(launcher.host)
        or os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
    ):
        yield
        return
    _idle.clear()
    if launcher.pid not in _watched:
        _watched.add(launcher.pid)
        threading.Thread(target=_leave_after, args=(launcher,), name="lorasweep-parent", daemon=True).start()
    try:
        yield
    finally:
        _idle.set()


def _leave_after(launcher: Owner) -> None:
    wait = threading.Event()
    while lease.lives(launcher):
        wait.wait(LOOK_EVERY_S)
    if not _idle.is_set() and interrupt.depth() > LOADING:
        signal.raise_signal(signal.SIGTERM)
        _idle.wait(MOST_S)
    os._exit(interrupt.EXIT_INTERRUPTED)

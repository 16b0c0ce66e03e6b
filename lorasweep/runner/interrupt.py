"""Signals that ask for an end: the next step is the last, and what runs is saved. A second Ctrl-C ends at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

EXIT_INTERRUPTED = 130

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""A person's; a scheduler that takes the machine away; a terminal that was closed; SLURM's --signal as people set it.
Windows lacks the last two."""


class Interrupts:
    """Counts the interrupts of this process."""

    def __init__(self, count: int = 0) -> None:
        self.count = count


STDOUT, STDERR = 1, 2
"""Their file numbers; sys.stderr of a notebook has none."""
_listening: list[Interrupts] = []
_preempted: list[int] = []
"""Signals of submitit's that were heard."""
_is_quiet = False
"""Another process of this terminal says what an interrupt does."""


def signals() -> list[int]:
    """Return the signals of this system that ask for an end. One that was switched off, as by nohup, stays so; SIGINT
    alone does not: launchers switch it off for their workers until these hear it themselves.
    """
    names = dict.fromkeys([*NAMES, _submitits() or NAMES[0]])
    there = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [s for s in there if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]


def _submitits() -> str | None:
    """Return the signal with which submitit announces that it takes the machine away; None outside its jobs."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    return f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"


def be_quiet() -> None:
    """Let the command say what an interrupt does: this process works for it."""
    global _is_quiet
    _is_quiet = True


def depth() -> int:
    """Return how many blocks listen, within each other."""
    return len(_listening)


def is_heard() -> bool:
    """Return whether an end was asked for, in a block that listens."""
    return any(interrupts.count for interrupts in _listening)


def hand_on() -> None:
    """Give submitit its signal, now that all is saved: it puts the job back into the cluster's queue and ends it."""
    while _preempted:
        signal.raise_signal(_preempted.pop())


def _hear(number: int, frame: FrameType | None) -> None:
    if signal.Signals(number).name == _submitits():
        _preempted.append(number)
    again = _listening[0].count > 0
    for interrupts in _listening:
        interrupts.count += 1
    if number == signal.SIGINT and again:  # systems send the others twice by themselves: to a process, to its group
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(EXIT_INTERRUPTED)
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    if not again and not _is_quiet:
        with suppress(OSError):
            os.write(STDERR, b"\nstopping after this step; Ctrl-C to stop at once\n")


def _leave_terminal() -> None:
    """Let what is printed from now on go nowhere: a closed terminal answers each line with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (STDOUT, STDERR):
        try:
            os.write(number, b"\n")
        except OSError:
            os.dup2(nowhere, number)
    os.close(nowhere)


@contextmanager
def heard(first: Callable[[], None] | None = None) -> Iterator[Interrupts]:
    """Count interrupts while the block runs; `first` is called from a thread after the first one.

    Blocks may lie within each other: each counts, those of the outer ones too. Outside the main thread Python hears
    none, and neither does this.
    """
    interrupts = Interrupts(_listening[-1].count if _listening else 0)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    _listening.append(interrupts)
    before = {s: signal.signal(s, _hear) for s in signals()}
    over = threading.Event()
    if first is not None:
        threading.Thread(target=_call_once, args=(interrupts, over, first), daemon=True).start()
    try:
        yield interrupts
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        _listening.remove(interrupts)


def _call_once(interrupts: Interrupts, over: threading.Event, first: Callable[[], None]) -> None:
    while not over.wait(0.1):
        if interrupts.count:
            first()
            return

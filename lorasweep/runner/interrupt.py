"""Ctrl-C: the first asks for a stop at the next step, the second ends the process at once; both can be resumed."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

EXIT_INTERRUPTED = 130

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""SIGTERM is how schedulers announce that they take the machine away."""


class Interrupts:
    """Counts the interrupts of this process."""

    def __init__(self) -> None:
        self.count = 0


STDERR = 2
"""Its file number; sys.stderr of a notebook has none."""
_listening: list[Interrupts] = []


def _hear(number: int, frame: FrameType | None) -> None:
    for interrupts in _listening:
        interrupts.count += 1
    if _listening[0].count > 1:
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(EXIT_INTERRUPTED)
    os.write(STDERR, b"\nstopping after this step; once more to stop at once\n")


@contextmanager
def heard(first: Callable[[], None] | None = None) -> Iterator[Interrupts]:
    """Count interrupts while the block runs; `first` is called from a thread after the first one.

    Blocks may lie within each other: each counts. Outside the main thread Python hears none, and neither does this.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    _listening.append(interrupts)
    before = {s: signal.signal(s, _hear) for s in SIGNALS}
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

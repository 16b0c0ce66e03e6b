"""One background thread a process that keeps MLflow up with the trials' folders, so that training never waits for it.

Nothing is kept in memory: the queue holds outboxes, and what they lack is read from their folders. While the store
does not answer, a breaker keeps the thread from asking more than once in RETRY_S.
"""

import logging
import threading
import time
from contextlib import suppress

from lorasweep.credentials import redact
from lorasweep.errors import MlflowDown, MlflowRefused
from lorasweep.tracking.mlflow_store import Mirror
from lorasweep.tracking.outbox import Outbox

log = logging.getLogger("lorasweep.tracking")

PUSH_S = 5.0
"""Least seconds between two pushes of one running trial."""
GATHER_S = 0.2
"""Wait before a push, for what is logged together to be sent together."""
RETRY_S = 10.0
"""How long the breaker keeps off a store that failed twice in a row; after a first failure FIRST_RETRY_S."""
FIRST_RETRY_S = 0.2
STALL_S = 5.0
"""A store that answers nothing for longer, in the middle of a push, is not waited for any more."""
START_S = 30.0
"""Longest time that importing MLflow and opening the store may take, once a process, without counting as a stall."""
BUSY_S = 1.0
"""Wait for a folder that another process is sending."""


class Sender:
    """The thread, its queue and its breaker, for one store."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._wake = threading.Condition()
        self._due: dict[Outbox, float] = {}
        self._flying: Outbox | None = None
        self._flying_since = 0.0
        self._mirror: Mirror | None = None
        self._complained = False
        self._failures = 0
        self._retry_at = 0.0
        self._thread = threading.Thread(target=self._run, name="lorasweep-mlflow", daemon=True)
        self._thread.start()

    @property
    def down(self) -> bool:
        """Whether the store failed twice in a row and has not answered since."""
        return self._failures > 1 or not self._thread.is_alive()

    def submit(self, box: Outbox, *, now: bool = False) -> None:
        """Have the outbox pushed soon, or next."""
        with self._wake:
            due = 0.0 if now else max(time.monotonic() + GATHER_S, box.pushed + PUSH_S)
            self._due[box] = min(due, self._due.get(box, due))
            self._wake.notify_all()

    def finish(self, box: Outbox, seconds: float, stall_s: float = STALL_S) -> bool:
        """Push the outbox next and wait for it; return whether everything was sent.

        The wait ends early where the store is down or the thread hangs in a request. An outbox is left in the queue
        of a store that is slow, and given up where it is down; either is said once, until the store is well again.
        """
        self.submit(box, now=True)
        deadline = time.monotonic() + seconds
        with self._wake:
            while self._holds(box) and not self._hopeless(stall_s) and time.monotonic() < deadline:
                self._wake.wait(0.1)
                if self._flying and self._flying_since > time.monotonic():
                    deadline = time.monotonic() + seconds
            late = self._holds(box)
            if late and self.down:
                self._give_up(box)
        if late:
            self._complain("is slow")
        return not box.ledger.behind

    def leave(self, box: Outbox) -> None:
        """Let go of an outbox that another process sends from now on."""
        with self._wake:
            box.closed = True
            self._give_up(box)

    def drain(self, seconds: float) -> int:
        """Push all that is queued, for some seconds at most; return how many runs are still in the queue."""
        deadline = time.monotonic() + seconds
        with self._wake:
            self._due = dict.fromkeys(self._due, 0.0)
            self._wake.notify_all()
            while (self._due or self._flying) and not self._hopeless(STALL_S) and time.monotonic() < deadline:
                self._wake.wait(0.1)
            return len(self._due) + (self._flying is not None)

    def _holds(self, box: Outbox) -> bool:
        return box in self._due or self._flying is box

    def _hopeless(self, stall_s: float) -> bool:
        now = time.monotonic()
        if not self._thread.is_alive():
            return True
        if self._flying is not None:
            answered = self._mirror.answered if self._mirror else 0.0
            return now - max(self._flying_since, answered) > stall_s
        return self.down and now < self._retry_at

    def _give_up(self, box: Outbox) -> None:
        self._due.pop(box, None)
        if self._flying is not box:
            box.release()

    def _complain(self, what: str) -> None:
        if not self._complained:
            rest = "training goes on, the folders keep all, `lorasweep sync` sends what is missing"
            log.warning("MLflow at %s %s; %s", redact(self._uri), what, rest)
        self._complained = True

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            box = self._next(0.0 if self._mirror else START_S)
            try:
                self._mirror = mirror = self._mirror or Mirror(self._uri)
                self._flying_since = time.monotonic()
                if box.take():
                    mirror.push(box)
                    self._sent(box)
                else:
                    self._landed(box, again=BUSY_S)
            except (MlflowDown, OSError) as error:
                self._failed(box, redact(str(error)))
            except MlflowRefused as error:
                self._refused(box, str(error))
            except Exception as error:  # MLflow's or ours: it ends this run's sending, not the thread
                self._refused(box, f"{type(error).__name__}: {redact(str(error))[:300]}")

    def _next(self, grace_s: float) -> Outbox:
        """Wait until an outbox is due and the breaker lets it pass; its flight is timed from `grace_s` later."""
        with self._wake:
            while True:
                now = time.monotonic()
                box = min(self._due, key=self._due.__getitem__, default=None)
                wait = max(self._due[box], self._retry_at) - now if box else None
                if box and wait is not None and wait <= 0:
                    del self._due[box]
                    self._flying, self._flying_since = box, now + grace_s
                    return box
                self._wake.wait(wait)

    def _landed(self, box: Outbox, again: float | None = None) -> None:
        """Note the end of a push; queue the outbox again after some seconds, or let go of an ended run's."""
        with self._wake:
            self._flying = None
            box.pushed = time.monotonic()
            if again is not None:
                self._due.setdefault(box, box.pushed + again)
            elif box not in self._due and box.closed:
                box.release()
            self._wake.notify_all()

    def _sent(self, box: Outbox) -> None:
        if self.down:
            log.warning("MLflow at %s answers again", redact(self._uri))
        self._failures, self._retry_at = 0, 0.0
        self._landed(box)
        self._complained = self._complained and bool(self._due)

    def _failed(self, box: Outbox, error: str) -> None:
        """Open the breaker, mark the run, and give up what has ended: its folder has all, for `sync`."""
        self._mark(box, error)
        self._failures += 1
        if self.down:
            self._complain(f"failed ({error})")
        with self._wake:
            self._retry_at = time.monotonic() + (RETRY_S if self.down else FIRST_RETRY_S)
            for other in [b for b in (*self._due, box) if b.closed and self.down]:
                self._due.pop(other, None)
                other.release()
        self._landed(box, again=None if box.closed and self.down else 0.0)

    def _refused(self, box: Outbox, error: str) -> None:
        self._mark(box, error)
        if not box.refused:
            log.warning("MLflow at %s: %s: %s", redact(self._uri), box.folder, error)
        box.refused = True
        self._landed(box)

    def _mark(self, box: Outbox, error: str) -> None:
        box.unsure = True
        box.ledger.error = error
        with suppress(OSError):  # the file says behind already
            box.save()

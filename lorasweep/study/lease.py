"""Who runs a trial and whether it lives: a worker's name, its sign of life, and the eye that watches for it."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Owner:
    """One worker of one process."""

    name: str
    host: str
    """This boot of this machine, in this process namespace: where `pid` means something."""
    pid: int
    born: float
    """When the process started: clock ticks since boot on Linux, else s since the epoch. A pid comes back."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_ended: set[str] = set()


def end(owner: Owner) -> None:
    """Say that an owner of this process does nothing any more, though the process lives."""
    _ended.add(owner.name)


def me() -> Owner:
    """Return a new owner in this process."""
    return Owner(uuid.uuid4().hex[:12], _here(), os.getpid(), _born(os.getpid()))


@cache
def _here() -> str:
    parts = [socket.gethostname()]
    for path, read in (("/proc/sys/kernel/random/boot_id", Path.read_text), ("/proc/self/ns/pid", os.readlink)):
        try:
            parts.append(read(Path(path)).strip()[:20])
        except OSError:
            continue
    return " ".join(parts)


class Watch:
    """Tells the dead from the living: by process on this machine, by signs of life on another."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[str, tuple[int, float]] = {}

    def dead(self, owner: Mapping[str, Any] | None, beat: int) -> bool:
        """Return whether an owner has died; `beat` is the count it last gave. No owner counts as dead.

        The time between two signs is measured here, so that the clocks of two machines need not agree.
        """
        if owner is None:
            return True
        if owner["host"] == _here():
            return owner["name"] in _ended or not _runs(owner["pid"], owner["born"])
        now = time.monotonic()
        seen, since = self._seen.get(owner["name"], (None, now))
        if seen != beat:
            since = now
        self._seen[owner["name"]] = (beat, since)
        return now - since > self._lease_s


def is_here(host: str) -> bool:
    """Return whether an owner's host is this machine, whose processes can be looked at."""
    return host == _here()


def lives(owner: Owner) -> bool:
    """Return whether the process of an owner on this machine runs."""
    return _runs(owner.pid, owner.born)


def _runs(pid: int, born: float) -> bool:
    try:
        return abs(_born(pid) - born) < 1.0 and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
        return False
    except psutil.AccessDenied:
        return True


def _born(pid: int) -> float:
    """Return when a process started. psutil's time moves with the machine's clock, the kernel's count does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.is_dir() and Path("/proc/self/stat").exists():
        return float(stat.read_text().rpartition(")")[2].split()[19])
    return psutil.Process(pid).create_time()


class Beat:
    """A thread that calls `act` every `every_s` seconds until it is stopped."""

    def __init__(self, act: Callable[[], None], every_s: float) -> None:
        self._act = act
        self._every_s = every_s
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lorasweep-beat", daemon=True)

    def __enter__(self) -> "Beat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            self._act()

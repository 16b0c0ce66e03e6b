"""What a container may use, as its control groups tell it: version 1 and 2. None where nothing is limited."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
UNLIMITED_BYTES = 2**60
"""Version 1 writes a number about the size of the address space where there is no limit."""


@dataclass(frozen=True)
class Memory:
    """A limit on memory, in bytes, and what is used of it."""

    limit: int
    used: int
    """Without files' pages, which the kernel gives up when memory is needed."""

    @property
    def free(self) -> int:
        return max(0, self.limit - self.used)


def memory() -> Memory | None:
    """Return the limit that leaves least room, of this process's group and those around it."""
    found = []
    for folder in _folders("memory"):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
        if limit is not None and limit < UNLIMITED_BYTES:
            facts = _facts(folder / "memory.stat")
            files = facts.get("inactive_file", facts.get("total_inactive_file", 0))
            found.append(Memory(limit, max(0, used - files)))
    return min(found, key=lambda m: m.free, default=None)


def cpus() -> float | None:
    """Return how many processors' time the groups may use together."""
    found = []
    for folder in _folders("cpu"):
        words = _text(folder / "cpu.max").split()
        quota = words[0] if words else _text(folder / "cpu.cfs_quota_us")
        period = words[1] if len(words) > 1 else _text(folder / "cpu.cfs_period_us")
        if quota.isdigit() and period.isdigit() and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


def oom_kills() -> int:
    """Return how many processes of the group the kernel has killed for want of memory."""
    for folder in _folders("memory"):
        for name in ("memory.events", "memory.oom_control"):
            facts = _facts(folder / name)
            if "oom_kill" in facts:
                return facts["oom_kill"]
    return 0


def _folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, innermost first."""
    for line in _text(GROUPS).splitlines():
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        top = MOUNT / names if names and (MOUNT / names).is_dir() else MOUNT / controller if names else MOUNT
        group = top / path.strip("/")
        while True:
            if group.is_dir():  # a container sees its group at the top, under another path
                yield group
            if group == top:
                break
            group = group.parent


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdigit() else None


def _facts(path: Path) -> dict[str, int]:
    """Return a file of lines `name number`."""
    pairs = [line.split() for line in _text(path).splitlines()]
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def threads_are_given() -> bool:
    """Tell whether the user has said how many threads a process may take; to be asked before joblib starts workers, as
    it says so to them.
    """
    return "OMP_NUM_THREADS" in os.environ

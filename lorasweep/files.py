"""Files written whole, and locks between processes that the system frees when their holder dies."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

import filelock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


CHECKPOINT = "checkpoint.pt"
"""In the folder of a trial that runs, where training/checkpoint.py writes it."""


def with_path(error: OSError, path: Path) -> OSError:
    """Return an error that names the file: the system names it where a file is opened, not where it is written."""
    error.filename = error.filename or str(path)
    return error


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Yield a file that takes the place of `path` when the block ends: a reader or a kill sees the old or the new one.

    Where the block raises, the old one stays. `durable` waits for the disk, so that a power cut too sees one of both.
    """
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.part")  # two writers have a file each
    try:
        with part.open("wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise with_path(error, path) from None
    finally:
        part.unlink(missing_ok=True)


def replace_file(path: Path, text: str | bytes, *, durable: bool = False) -> None:
    """Write a file as a whole: a reader, or a kill, sees the old or the new one; with `durable` a power cut too."""
    with replacing(path, durable=durable) as file:
        file.write(text.encode() if isinstance(text, str) else text)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None where there is no file, or a power cut took its content."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def cache_folder() -> Path:
    """Return the folder of what is made once for all studies: $LORASWEEP_CACHE, or lorasweep in the user's cache."""
    base = os.environ.get("LORASWEEP_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lorasweep"


class FileLock:
    """A lock on a file, between processes, and between threads of one process that each have their own object.

    The system frees it when its holder dies. Where there is flock, those who wait are served in turn; a lock that is
    polled, as filelock's, starves one of several busy writers for seconds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: IO[str] | filelock.BaseFileLock | None = None

    def acquire(self, blocking: bool = True) -> bool:
        """Take the lock, or with blocking=False return False where another has it."""
        self._held = self._polled(blocking) if fcntl is None else self._queued(blocking)
        return self._held is not None

    def _queued(self, blocking: bool) -> IO[str] | None:
        file = self._path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX if blocking else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _polled(self, blocking: bool) -> filelock.BaseFileLock | None:
        lock = filelock.FileLock(self._path)
        try:
            lock.acquire(blocking=blocking)
        except filelock.Timeout:
            return None
        return lock

    def release(self) -> None:
        held, self._held = self._held, None
        if isinstance(held, filelock.BaseFileLock):
            held.release()
        elif held is not None:
            held.close()

    def __enter__(self) -> "FileLock":
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

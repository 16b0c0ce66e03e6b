"""Where a study's queue is kept: a journal file in its folder, or PostgreSQL; and a lock over several calls."""

import functools
import json
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from optuna.storages.journal._storage import JournalOperation
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.exc import InterfaceError, OperationalError

from lorasweep.credentials import without_password
from lorasweep.errors import ConfigError, StorageDown
from lorasweep.files import FileLock, with_path

P = ParamSpec("P")
T = TypeVar("T")


DOWN = (StorageInternalError, OperationalError, InterfaceError)
"""What a database raises that is gone for a while, or for good."""

PATIENCE_S = 60.0
"""Seconds that a call waits for a database to come back."""


def patient(call: Callable[P, T]) -> Callable[P, T]:
    """Let a call that may be made twice wait for its database to come back. Raises StorageDown when it does not."""

    @functools.wraps(call)
    def waits(*arguments: P.args, **named: P.kwargs) -> T:
        end = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call(*arguments, **named)
            except DOWN as error:
                if time.monotonic() > end:
                    raise StorageDown(f"the study's database does not answer: {str(error).splitlines()[0]}") from error
                time.sleep(1.0)

    return waits


@dataclass(frozen=True)
class Store:
    """An Optuna storage with what it lacks: a lock over several of its calls."""

    optuna: BaseStorage
    exclusive: Callable[[], AbstractContextManager[Any]]
    """The lock; the system frees it when its holder dies. Not to be taken twice."""
    ids: Callable[[int, TrialState], list[int]]
    """(study id, state) -> ids of its trials in that state, by number."""


_OF_STUDY = {"worker_id": "", "study_id": 0}
DAMAGED = _OF_STUDY | {"op_code": int(JournalOperation.SET_STUDY_USER_ATTR)}
LOST_TRIAL = _OF_STUDY | {
    "op_code": int(JournalOperation.CREATE_TRIAL),
    "state": TrialState.WAITING.value,
    "datetime_start": None,
}

logger = logging.getLogger(__name__)


class JournalLock(FileLock, BaseJournalFileLock):
    """The journal's lock. Optuna's own stalls for 30 s when its holder is killed."""


class JournalFile(JournalFileBackend):
    """Optuna's journal file that outlives a writer killed, or a disk filled, in the middle of a line, and a damaged
    line among the others: what that one said is lost, a trial that it made comes back as a waiting one without a point.
    """

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Yield the log from an entry on; a last line without its end is not there yet."""
        number = log_number_from if log_number_from in self._log_number_offset else 0
        offset, size = self._log_number_offset[number], os.stat(self._file_path).st_size
        instead: dict[int, list[dict[str, Any]]] | None = None
        with open(self._file_path, "rb") as file:
            file.seek(offset)
            for line in file:
                if offset + len(line) > size or not line.endswith(b"\n"):
                    return
                entry = _entry(line)
                if entry is None and instead is None:
                    instead = self._instead()
                for log in [entry] if entry is not None else (instead or {}).get(offset, []):
                    number += 1
                    if number > log_number_from:
                        yield log
                offset += len(line)
                self._log_number_offset[number] = offset

    def _instead(self) -> dict[int, list[dict[str, Any]]]:
        """Return what to read in place of each damaged line, by where it begins: a trial for each that later lines
        know of and no line makes, or a note.
        """
        made, offset, found = 0, 0, {}
        with open(self._file_path, "rb") as file:
            for count, line in enumerate(file, 1):
                entry = _entry(line)
                if entry is None:
                    logger.warning("%s: line %d is damaged, what it said is lost", self._file_path, count)
                    found[offset] = [DAMAGED | {"user_attr": {f"damaged:{count}": True}}]
                elif entry["op_code"] == JournalOperation.CREATE_TRIAL:
                    made += 1
                while found and entry is not None and entry.get("trial_id", -1) >= made:
                    found[max(found)].append(LOST_TRIAL)
                    made += 1
                offset += len(line)
        return found

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._lock.acquire()
        try:
            with open(self._file_path, "r+b", buffering=0) as file:
                end = _whole_lines(file)
                file.truncate(end)
                file.seek(end)
                try:
                    _write_all(file, lines)
                    os.fsync(file.fileno())
                except OSError as error:
                    file.truncate(end)
                    raise with_path(error, Path(self._file_path)) from None
        finally:
            self._lock.release()


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return what a line of the journal says, None for a damaged one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "op_code" in found else None


def _write_all(file: Any, data: bytes) -> None:
    while data:
        data = data[file.write(data) :]


def _whole_lines(file: Any) -> int:
    """Return where the last whole line ends; what follows was never acknowledged to anybody."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def open_store(folder: Path, url: str | None) -> Store:
    """Return the store of the study in `folder`, or of a database. Raises ConfigError where it cannot be reached."""
    if url is None:
        lock = JournalLock(folder / "journal.lock")
        storage = JournalStorage(JournalFile(str(folder / "journal.log"), lock_obj=lock))
        return Store(storage, partial(FileLock, folder / "claim.lock"), partial(_journal_ids, storage))
    return _postgres(url)


def _journal_ids(storage: BaseStorage, study_id: int, state: TrialState) -> list[int]:
    return [t._trial_id for t in storage.get_all_trials(study_id, deepcopy=False, states=(state,))]


class _Cached(_CachedStorage):
    """Optuna's cache, which only takes parameters of trials it has listed; a claimed one it may not have seen yet."""

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        known = trial_id in self._trial_id_to_study_id_and_number
        to: BaseStorage = super() if known else self._backend  # type: ignore[assignment]
        to.set_trial_param(trial_id, param_name, param_value_internal, distribution)


def _postgres(url: str) -> Store:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        raise ConfigError(["search.storage: PostgreSQL needs the extra: pip install 'lorasweep[postgres]'"]) from None
    driver = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        backend = RDBStorage(driver, engine_kwargs={"pool_pre_ping": True})
    except OperationalError as error:
        why = str(error.orig).strip().splitlines()[0]
        raise ConfigError([f"search.storage: cannot reach {without_password(url)} ({why})"]) from None
    key = zlib.crc32(b"lorasweep claim")

    @contextmanager
    def exclusive() -> Iterator[None]:
        with backend.engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            yield  # the end of the connection's transaction frees the lock

    def ids(study_id: int, state: TrialState) -> list[int]:
        with backend.engine.connect() as connection:
            query = text("SELECT trial_id FROM trials WHERE study_id = :study AND state = :state ORDER BY number")
            return list(connection.execute(query, {"study": study_id, "state": state.name}).scalars())

    return Store(_Cached(backend), exclusive, ids)

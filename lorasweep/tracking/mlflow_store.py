"""Brings an MLflow run to the state of its folder. The owner of mlflow.

`Mirror.push` may be called at any time and any number of times: it sends what MLflow lacks, each point once. After a
failure, a resume or in another process it asks MLflow what it holds and sends the rest.
"""

import json
import logging
import os
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

from lorasweep.console import cut
from lorasweep.credentials import redact
from lorasweep.errors import LorasweepError, MlflowDown, MlflowRefused
from lorasweep.files import FileLock
from lorasweep.study.meta import find_meta
from lorasweep.tracking import outbox
from lorasweep.tracking.outbox import Ledger, Outbox, Point

T = TypeVar("T")

log = logging.getLogger("lorasweep.tracking")

LOCAL_FILE_SYSTEMS = ("bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs")

KEY_TAG = "lorasweep.key"
EXPERIMENT_NOTE = (
    "LoRA sweeps. Each run of this table is a study: its description asks the question and gives the answer, and **+** "
    f"opens its trials. Tick some and press **Compare**: `{outbox.OBJECTIVE}` is the metric that ranks a study's "
    "trials (the tag `metric` says which it is). The search `tags.study = 'NAME'` shows one study alone."
)
EXPERIMENT_TAGS = {outbox.NOTE: EXPERIMENT_NOTE, "mlflow.experimentKind": "custom_model_development"}
"""What MLflow shows above the table of runs; and that it is a table of runs, not of traces."""
VIEWS = "mlflow.sharedViewState."
"""With a key, the experiment's tag in which MLflow keeps a view of the table of runs."""
COLUMNS = ("metrics.`params_trainable`", "metrics.`train_s`")
"""What a view shows of trials besides the objective and what varied."""
BATCH = 1000
"""Metrics in one call: MLflow's limit."""
MOST_PARAM = 500
"""Characters of a param: a list of 400 modules makes a table unreadable, and of some thousand is refused for ever."""
MOST_TAG = 5000
"""Characters of a tag, within MLflow's limit of 8,000."""
MOST_KEYS = 50
"""Columns of varied keys in a saved view."""
LOCK_TRIES = 8
"""Tries of a call that finds SQLite locked; MLflow itself waits up to 20 s in each."""

REQUEST_TIMEOUT_S = 5
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(REQUEST_TIMEOUT_S),
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a creation sent twice is two runs; push asks before it sends again
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout is the sweep's table
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Defaults for this process; what the user has set stays."""


class Mirror:
    """A client of one store."""

    def __init__(self, uri: str) -> None:
        load()
        self._here = redact(uri).rstrip("/")
        self._client = _guard(lambda: _client(uri))
        self._experiments: dict[str, str] = {}
        self._parents: dict[Path, str | None] = {}
        self.answered = time.monotonic()
        """When the store last did what it was asked, on the monotonic clock."""
        self._file = _sqlite_file(uri)
        self._gate = self._file.with_name(f".{self._file.name}.lock") if self._file else None

    def push(self, box: Outbox) -> int:
        """Send what MLflow lacks, end the run if it has ended; return the number of points sent.

        Raises MlflowDown or MlflowRefused; what was sent until then is not sent again.
        """
        note = box.ledger
        if not note.behind and note.uri == self._here:
            return 0
        status, covered = note.status, note.covered
        self._ensure(box)
        if box.unsure:
            self._look(box)
        count = self._log(box, None if status else covered)
        self._dataset(box)
        self._artifacts(box)
        if status:
            self._ask("set_terminated", note.run_id, status, note.ended_ms)
        if note.kind == "study":
            self._view(box)
        if status and note.kind == "study" and outbox.NOTE in note.tags:
            self._tell(box)
        with box.lock:
            note.error = ""
            note.behind = note.status is None or note.status != status
            note.save(box.folder)
        return count

    # --- the run -----------------------------------------------------------------------------------------------------

    def _ensure(self, box: Outbox) -> None:
        """Make the run where there is none; find it where the answer to its creation was lost."""
        note = box.ledger
        if note.uri and note.uri != self._here:
            note.run_id = note.parent = None
        note.uri = self._here
        if note.run_id:
            return
        experiment = self._experiment(note.experiment)
        run = self._find(note, experiment) if note.asked else None
        box.unsure = run is not None
        if run is None:
            tags = self._start_tags(box)
            note.asked = True
            box.save()
            run = self._ask("create_run", experiment, note.started_ms, tags)
            box.offset, box.held = 0, set()
            box.sent = {("tag", k, v) for k, v in tags.items()}
        note.run_id, box.artifact_uri = run.info.run_id, run.info.artifact_uri
        box.save()

    def _start_tags(self, box: Outbox) -> dict[str, str]:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

        with box.lock:
            tags = {MLFLOW_RUN_NAME: box.ledger.name, KEY_TAG: box.ledger.key, **box.ledger.tags}
        if box.ledger.kind == "trial":
            box.ledger.parent = self._parent(box.folder.parent) or box.ledger.parent
            if box.ledger.parent:
                tags[MLFLOW_PARENT_RUN_ID] = box.ledger.parent
        return tags

    def _parent(self, folder: Path) -> str | None:
        """Return the study's run, made now if it could not be made when the study began; None outside a study."""
        if folder not in self._parents and (folder / outbox.NAME).exists():
            with FileLock(folder / outbox.LOCK):
                note = outbox.load(folder)
                assert note is not None
                self._ensure(Outbox(folder, note))
                self._parents[folder] = note.run_id
        return self._parents.get(folder)

    def _experiment(self, name: str) -> str:
        if name not in self._experiments:
            found = self._ask("get_experiment_by_name", name)
            if found is None:
                with suppress(MlflowRefused, MlflowDown):  # another process may have been faster
                    place = (self._file.parent / "mlartifacts").as_uri() if self._file else None
                    self._ask("create_experiment", name, artifact_location=place, tags=EXPERIMENT_TAGS)
                    if self._file:
                        _write_ahead(self._file)
                found = self._ask("get_experiment_by_name", name)
            if found is None:
                raise MlflowDown(f"no experiment {name!r} in {self._here}, and none could be made")
            self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _find(self, note: Ledger, experiment: str) -> Any | None:
        query = f"tags.`{KEY_TAG}` = '{note.key}'"
        found = self._ask("search_runs", [experiment], query, max_results=1)
        return found[0] if found else None

    def _look(self, box: Outbox) -> None:
        """Learn what the run holds; make it anew where it is gone. Raises MlflowRefused for a deleted one."""
        note = box.ledger
        try:
            run = self._ask("get_run", note.run_id)
        except _Missing:
            note.run_id = None
            self._ensure(box)
            run = self._ask("get_run", note.run_id)
        if run.info.lifecycle_stage == "deleted":
            raise MlflowRefused(f"run {note.run_id} was deleted in MLflow; restore it there, or delete {outbox.NAME}")
        box.artifact_uri = run.info.artifact_uri
        box.sent = {("tag", k, v) for k, v in run.data.tags.items()} | {("param", k) for k in run.data.params}
        box.sent |= {("dataset", i.dataset.digest) for i in run.inputs.dataset_inputs}
        box.sent |= {("summary", k, repr(v)) for k, v in run.data.metrics.items()}
        box.held = set()
        for key in run.data.metrics:
            box.held |= {(key, m.step) for m in self._ask("get_metric_history", note.run_id, key)}
        box.offset, box.unsure = 0, False
        if box.live and note.status is None and run.info.status != "RUNNING":
            self._ask("update_run", note.run_id, status="RUNNING")

    # --- what it holds -----------------------------------------------------------------------------------------------

    def _log(self, box: Outbox, covered: int | None) -> int:
        """Send new points, params and tags, in one call where they fit; return the number of points."""
        from mlflow.entities import Metric, Param, RunTag

        points, offset = outbox.points(box.folder / outbox.POINTS, box.offset, covered)
        evaluated = {("summary", k, repr(v)) for k, v, *_ in points if k == outbox.OBJECTIVE}
        with box.lock:
            note = box.ledger
            there = box.sent | evaluated
            summary = {k: v for k, v in note.summary.items() if ("summary", k, repr(v)) not in there}
            params = [(k, v) for k, v in note.params.items() if ("param", k) not in box.sent]
            tags = [(k, v) for k, v in note.tags.items() if ("tag", k, v) not in box.sent]
        if box.held:
            points = [p for p in points if (p[0], p[3]) not in box.held]
        # first, because MLflow's comparison begins with the metric that a run had first
        points.sort(key=lambda point: point[0] != outbox.OBJECTIVE)
        points = [(k, v, note.ended_ms or note.started_ms, 0) for k, v in summary.items()] + points
        first = {
            "params": [Param(k, cut(v, MOST_PARAM)) for k, v in params],
            "tags": [RunTag(k, cut(v, MOST_TAG)) for k, v in tags],
        }
        for part in _parts(points) or ([[]] if params or tags else []):
            self._ask("log_batch", note.run_id, metrics=[Metric(*p) for p in part], **first)
            first = {}
        box.sent |= {("param", k) for k, _ in params} | {("tag", *t) for t in tags}
        box.sent |= evaluated | {("summary", k, repr(v)) for k, v in summary.items()}
        box.offset = offset
        return len(points)

    def _view(self, box: Outbox) -> None:
        """Save a view of MLflow's table: the study's trials, best first, with what varied and what they cost."""
        note, study = box.ledger, find_meta(box.folder)
        if study is None or ("view",) in box.sent:
            return
        objective = f"metrics.`{outbox.OBJECTIVE}`"
        state = {
            "searchFilter": f"tags.`mlflow.parentRunId` = '{note.run_id}'",
            "orderByKey": objective,
            "orderByAsc": not study.maximize,
            "selectedColumns": [objective, *(f"params.`{k}`" for k in study.swept[:MOST_KEYS]), *COLUMNS],
        }
        saved = {"name": f"{note.name}: trials, best first", "createdAt": note.started_ms, "state": json.dumps(state)}
        self._ask("set_experiment_tag", self._experiment(note.experiment), VIEWS + str(note.run_id), json.dumps(saved))
        box.sent.add(("view",))

    def _tell(self, box: Outbox) -> None:
        """Let the experiment tell of a study that has ended, and lead to its trials."""
        note, experiment = box.ledger, self._experiment(box.ledger.experiment)
        trials = f"[its trials, best first](#/experiments/{experiment}/runs?viewStateShareKey={note.run_id})"
        told = cut(note.tags[outbox.NOTE], MOST_TAG)
        last = f"### Last study: [{note.name}](#/runs/{note.run_id}), {trials}\n\n{told}"
        self._ask("set_experiment_tag", experiment, outbox.NOTE, f"{last}\n\n{EXPERIMENT_NOTE}")

    def _dataset(self, box: Outbox) -> None:
        entry = box.ledger.dataset
        if entry is None or ("dataset", entry["digest"]) in box.sent:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [DatasetInput(Dataset(**entry), [InputTag("mlflow.data.context", "training")])]
        self._ask("log_inputs", box.ledger.run_id, datasets=inputs)
        box.sent.add(("dataset", entry["digest"]))

    def _artifacts(self, box: Outbox) -> None:
        """Copy the artifacts, directly where the run keeps them on this machine's disk: MLflow re-reads the run."""
        with box.lock:
            wanted = [(str(path), name or "") for path, name in box.ledger.artifacts]
        for path, name in wanted:
            source = box.folder / path
            if ("artifact", path, name) in box.sent or not source.exists():
                continue
            place = _local(box.artifact_uri)
            if place is not None:
                _guard(partial(_copy, source, place / name))
            else:
                send = "log_artifacts" if source.is_dir() else "log_artifact"
                self._ask(send, box.ledger.run_id, str(source), name or None)
            box.sent.add(("artifact", path, name))

    def _ask(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Return what the client's method says; try again where SQLite is locked.

        Raises MlflowDown or MlflowRefused.
        """
        call = partial(getattr(self._client, name), *arguments, **named)
        for left in reversed(range(LOCK_TRIES)):
            try:
                with self._turn():
                    answer = _guard(call)
            except (MlflowDown, MlflowRefused) as error:
                if not left or "database is locked" not in str(error):
                    raise
                time.sleep(random.uniform(0.05, 0.5))
            else:
                self.answered = time.monotonic()
                return answer
        raise AssertionError("the last try returns or raises")

    def _turn(self) -> AbstractContextManager[Any]:
        """Queue up for a SQLite file: its own lock is polled, which starves a writer for seconds."""
        return FileLock(self._gate) if self._gate else nullcontext()


class _Missing(MlflowRefused):
    """MLflow has no such run."""


KINDS: dict[str, type[LorasweepError]] = {
    "INVALID_PARAMETER_VALUE": MlflowRefused,
    "INVALID_STATE": MlflowRefused,
    "BAD_REQUEST": MlflowRefused,
    "RESOURCE_DOES_NOT_EXIST": _Missing,
}
"""MLflow's error codes that mean more than a failure of the moment."""

SHUT = ("UNAUTHENTICATED", "PERMISSION_DENIED")
REFUSED = "it refuses user or password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


def load() -> None:
    """Import MLflow, which takes seconds, with our defaults and without its chatter."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for name, level in {"alembic": "WARNING", "mlflow": "WARNING", "mlflow.store.db.utils": "CRITICAL"}.items():
        logging.getLogger(name).setLevel(level)
    for name in ("mlflow.tracking", "sqlalchemy.exc"):
        import_module(name)


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    file = _sqlite_file(uri)
    if file is not None and file.parent.is_dir():
        with FileLock(file.with_name(f".{file.name}.lock")):
            _make_whole(file)
    return MlflowClient(uri)


def _make_whole(file: Path) -> None:
    """Make a SQLite store where there is none, or a half-made one; its lock is held.

    MLflow takes seconds for the tables: two processes in it, or a kill, break the file for good. So they are made in
    another file, which then takes the name. A store that holds runs is never touched.
    """
    for part in file.parent.glob(f".{file.name}.*.part*"):  # of a maker that was killed
        part.unlink(missing_ok=True)
    if file.exists():
        if _is_whole(file):
            return
        broken = file.with_name(f"{file.name}.broken-{time.strftime('%Y%m%d-%H%M%S')}")
        file.rename(broken)
        log.warning("%s was half made and is made anew; what was there is %s now", file, broken.name)
    from mlflow.tracking import MlflowClient

    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    client: Any = MlflowClient(f"sqlite:///{part}")
    client.search_experiments(max_results=1)
    client._tracking_client.store.engine.dispose()
    part.rename(file)


def _is_whole(file: Path) -> bool:
    """Tell whether a store has all its tables, or runs at least: one of an older MLflow is MLflow's own to upgrade."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    try:
        with closing(sqlite3.connect(file)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "runs" in tables and connection.execute("SELECT 1 FROM runs LIMIT 1").fetchone():
                return True
            if "alembic_version" not in tables:
                return False
            revision = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:  # locked, or not to be opened: MLflow will tell
        return "no such table" not in str(error)
    except sqlite3.DatabaseError:  # no database at all
        return False
    return revision is not None and revision[0] == _get_latest_schema_revision()


def _guard(call: Callable[[], T]) -> T:
    """Return what the call returns; turn the failures of a store, a network or a disk into MlflowDown or
    MlflowRefused, without credentials."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return call()
    except MlflowException as error:
        if error.error_code in SHUT:
            raise MlflowDown(REFUSED) from None
        kind = KINDS.get(error.error_code, MlflowDown)
        raise kind(_line(error)) from None
    except (SQLAlchemyError, OSError, ValueError) as error:
        raise MlflowDown(_line(error)) from None


def _line(error: Exception) -> str:
    """Return what went wrong in a line: the cause, where a long request is told around it."""
    text = redact(str(error)).strip()
    cause = re.search(r"Caused by \w+\([\"']?(.*?)[\"']?\)*$", text)
    lines = (cause[1] if cause else text).splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _parts(points: list[Point]) -> Iterable[list[Point]]:
    return [points[start : start + BATCH] for start in range(0, len(points), BATCH)]


def _sqlite_file(uri: str) -> Path | None:
    path = uri.partition("?")[0].removeprefix("sqlite:///")
    return Path(path).resolve() if uri.startswith("sqlite:///") and path else None


def _write_ahead(file: Path) -> None:
    """Let SQLite append to a log: commits cost half, and a reader, such as the UI, stops no writer.

    Only on a file system known to be of this machine: the log needs memory that its users share.
    """
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text(encoding="utf8").splitlines()]
    except OSError:
        return
    around = [(len(place), kind) for place, kind in mounts if file.is_relative_to(unquote(place))]
    if around and max(around)[1] in LOCAL_FILE_SYSTEMS:
        with suppress(sqlite3.Error), closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")


def _local(uri: str) -> Path | None:
    parsed = urlparse(uri)
    return Path(unquote(parsed.path)) if parsed.scheme in ("", "file") and not parsed.netloc else None


def _copy(source: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, place / source.name)

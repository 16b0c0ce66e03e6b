"""What a run's folder remembers for MLflow: mlflow.json (all that makes the run again) and metrics.jsonl (its points).

Both can be read after a kill at any moment: mlflow.json is replaced as a whole, metrics.jsonl is appended line by line
and a torn last line is no line.
"""

import json
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lorasweep.credentials import redact
from lorasweep.files import FileLock, read_json, replace_file
from lorasweep.study.result import RESULT, TrialResult, read_result

NAME = "mlflow.json"
POINTS = "metrics.jsonl"
LOCK = ".mlflow.lock"

ARTIFACTS = (("adapter", "adapter"), ("config.yaml", None), (RESULT, None), ("log.txt", None))
"""What an ended trial leaves, as (path in its folder, path in the run): for a trial killed before it could say so."""

EVALUATION = "epoch"
"""Key of the line of an evaluation, which a checkpoint of its step may know or not."""

SUMMARY = "wall_s"
"""Key of the line that sums an ended trial up: one that goes on after all will write it again."""

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""

OBJECTIVE = "objective"
"""The metric that ranks the trials of a study, under one name for all tasks; the tag `metric` says which it is."""

Point = tuple[str, float, int, int]
"""Metric key, value, time in ms, step."""


def now_ms() -> int:
    return int(time.time() * 1000)


@dataclass(kw_only=True)
class Ledger:
    """What mlflow.json holds."""

    experiment: str
    name: str
    kind: str = "trial"
    """trial or study."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Tag of the run by which it is found again when the answer to its creation was lost."""
    started_ms: int = field(default_factory=now_ms)
    began_ms: int = field(default_factory=now_ms)
    """When this folder was last taken up; a result.json older than that is of an earlier try."""
    uri: str = ""
    """Store that holds the run, without credentials."""
    run_id: str | None = None
    asked: bool = False
    """A run was asked for, so that it may exist though run_id is not known."""
    parent: str | None = None
    """Run of the study; null: whatever run the study's own mlflow.json names."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    dataset: dict[str, str] | None = None
    """name, digest, source_type, source and profile, as MLflow names them."""
    artifacts: list[list[str | None]] = field(default_factory=list)
    """Pairs: path in the folder, folder in the run."""
    summary: dict[str, float] = field(default_factory=dict)
    """Metrics that stand in no metrics.jsonl: the winner's, in the study's run; `objective`, in a trial's."""
    answer: str = ""
    """A study's answer, in Markdown."""
    covered: int = -1
    """Points up to this step cannot be written again, so MLflow may have them."""
    status: str | None = None
    """FINISHED, FAILED or KILLED once the run has ended."""
    ended_ms: int | None = None
    behind: bool = True
    """MLflow may lack something; false only after everything was sent and the run was ended."""
    error: str = ""
    """Why the last try to send failed."""

    def save(self, folder: Path) -> None:
        replace_file(folder / NAME, json.dumps(asdict(self), indent=1))

    def end(self, status: str, ended_ms: int) -> None:
        """Note the end: every point is covered from here on."""
        self.status, self.ended_ms, self.behind = status, ended_ms, True


def load(folder: Path) -> Ledger | None:
    """Return what the folder remembers, or None where it never had a run or a power cut took the file's content."""
    found = read_json(folder / NAME)
    if found is None:
        return None
    known = {f.name for f in fields(Ledger)}
    return Ledger(**{k: v for k, v in found.items() if k in known})


def ended(folder: Path, ledger: Ledger) -> bool:
    """Return whether the run has ended; take the end of a trial that was killed before it could note it from its
    result.json."""
    if ledger.status is not None or ledger.kind != "trial":
        return ledger.status is not None
    result = read_result(folder)
    if result is None:
        return False
    written_ms = int((folder / RESULT).stat().st_mtime * 1000)
    if written_ms < ledger.began_ms - 1:
        return False
    ledger.tags["state"] = result.state
    if result.reason:
        ledger.tags["reason"] = redact(result.reason)[:500]
    there: list[list[str | None]] = [[path, name] for path, name in ARTIFACTS if (folder / str(path)).exists()]
    ledger.artifacts += [pair for pair in there if pair not in ledger.artifacts]
    summarise(ledger, result)
    ledger.end("FAILED" if result.state == "FAIL" else "FINISHED", written_ms)
    return True


def summarise(ledger: Ledger, result: TrialResult) -> None:
    """Note what lets trials of all tasks be compared in one table: the ranking metric, and the rerun line."""
    if result.metric:
        ledger.summary[OBJECTIVE] = float(result.metric.value)
        ledger.tags["metric"] = result.metric.name
    if result.rerun:
        ledger.tags[NOTE] = redact(f"Run it again: `{result.rerun}`")


def drop_after(path: Path, step: int | None, evaluated: int | None = None) -> None:
    """Drop the lines of later steps (0: all of them; None: of none) and what is no line: one torn by a kill.

    `evaluated` is the last step whose evaluation stays, `step` where it is None.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _stays(_parsed(line), step, step if evaluated is None else evaluated)]
    if kept != lines:
        replace_file(path, b"".join(kept))


def _stays(values: Mapping[str, Any] | None, step: int | None, evaluated: int | None) -> bool:
    if values is None or step is None or evaluated is None:
        return values is not None
    last = evaluated if EVALUATION in values else step
    return step > 0 and values["step"] <= last and SUMMARY not in values


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, or None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "step" in found and "time_ms" in found else None


def points(path: Path, offset: int, covered: int | None) -> tuple[list[Point], int]:
    """Return the points from byte `offset` up to step `covered` (None: all), and the offset to go on from."""
    found: list[Point] = []
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return found, offset
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                break
            values = _parsed(line)
            if values is not None:
                step, time_ms = values.pop("step"), values.pop("time_ms")
                if covered is not None and step > covered:
                    break
                found += [(k, float(v), time_ms, step) for k, v in values.items()]
            offset += len(line)
    return found, offset


def take(folder: Path) -> FileLock | None:
    """Return the lock, held, that says who sends this folder; None where another has it."""
    lock = FileLock(folder / LOCK)
    return lock if lock.acquire(blocking=False) else None


@dataclass(eq=False)
class Outbox:
    """One run's folder and how much of it MLflow has, as far as this process knows."""

    folder: Path
    ledger: Ledger
    live: bool = True
    """A trial of this process: its run is set to RUNNING until it ends."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the ledger is changed or copied: a trial and the sender share it."""
    offset: int = 0
    """Bytes of metrics.jsonl that MLflow has."""
    unsure: bool = True
    """MLflow may hold what this process does not know of."""
    held: set[tuple[str, int]] = field(default_factory=set)
    """Metric keys and steps found in MLflow, never sent again."""
    sent: set[tuple[str, ...]] = field(default_factory=set)
    """Params, tags, the data set and artifacts that were sent."""
    artifact_uri: str = ""
    taken: FileLock | None = None
    pushed: float = float("-inf")
    """When it was last pushed, on the monotonic clock."""
    closed: bool = False
    """Nothing more will come: it may be given up."""
    refused: bool = False
    """MLflow does not take it, and that was said."""

    def save(self) -> None:
        with self.lock:
            self.ledger.save(self.folder)

    def take(self) -> bool:
        """Become the one that sends this folder; False while another is. What that one made is known from here on."""
        if self.taken is None:
            self.taken = take(self.folder)
            found = load(self.folder) if self.taken else None
            if found:
                self.ledger.run_id, self.ledger.asked, self.ledger.uri = found.run_id, found.asked, found.uri
        return self.taken is not None

    def release(self) -> None:
        if self.taken:
            self.taken.release()
        self.taken = None

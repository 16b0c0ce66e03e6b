"""Events to metrics.jsonl, which is the truth, and to MLflow, which mirrors it and may be down, slow or restarted.

A trial writes its folder and goes on; a background thread brings the MLflow run to the folder's state (sender.py,
mlflow_store.py). MLflow is sent only what is covered by a checkpoint, so that it never holds a point that a resumed
trial writes again. What could not be sent stays in the folder, and `sync` sends it.
"""

import atexit
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasweep.config.spec import TrialSpec, flattened
from lorasweep.credentials import redact
from lorasweep.data.dataset import Data
from lorasweep.errors import MlflowDown, MlflowRefused
from lorasweep.hardware import system_metrics
from lorasweep.study.result import read_result
from lorasweep.tracking import outbox, study_description
from lorasweep.tracking.mlflow_store import Mirror
from lorasweep.tracking.outbox import Ledger, Outbox
from lorasweep.tracking.sender import Sender

OPEN_S = 30.0
"""Longest wait for the store when a study begins: a fresh database takes seconds."""
CLOSE_S = 5.0
"""Longest wait for the sender when a run ends."""
EXIT_S = 10.0
"""Longest wait for it when the process ends."""
SYNC_S = 60.0
"""Longest time for the trials that are behind when a study ends; `sync` has as long as it needs."""
REPORTS = ("report.html", "report.md")
"""What `report` writes into a study's folder."""

_senders: dict[str, Sender] = {}
if hasattr(os, "register_at_fork"):  # a thread does not come along into a fork
    os.register_at_fork(after_in_child=_senders.clear)


def default_uri(outputs: str) -> str:
    """Return the SQLite store in the outputs folder."""
    return f"sqlite:///{Path(outputs).resolve()}/mlflow.db"


def store_uri(spec: TrialSpec) -> str:
    return spec.tracking.uri or default_uri(spec.outputs)


# --- a study ---------------------------------------------------------------------------------------------------------


def open_study(spec: TrialSpec, name: str, note: str, *, wait: bool = True) -> str | None:
    """Create database, experiment and the study's run, before any worker starts; return its id.

    The run of a study that goes on is taken up again. None where tracking is off, or where the store does not answer,
    or answers later as nobody waits for it: the study's folder remembers that, and whoever reaches the store first
    makes the run.
    """
    if not spec.tracking.enabled:
        return None
    folder = Path(spec.outputs) / name
    folder.mkdir(parents=True, exist_ok=True)
    tags = {"mlflow.note.content": redact(note), "study": name, "kind": "study"}
    box = Outbox(folder, _take_up(folder, spec.tracking.experiment, name, tags, "study"))
    box.closed = True
    box.save()
    if wait:
        _sender(store_uri(spec)).finish(box, OPEN_S, stall_s=OPEN_S)
        return box.ledger.run_id
    _sender(store_uri(spec)).submit(box, now=True)
    return None


def close_study(
    spec: TrialSpec,
    parent: str | None,
    metrics: Mapping[str, float],
    ok: bool,
    folder: Path | None = None,
    answer: str = "",
) -> None:
    """End the study's run with the winner's metrics and the answer in Markdown, and send what MLflow missed of its
    trials.

    Without `folder`, the study is the one in the outputs folder whose run is `parent`.
    """
    flush()
    folder = folder or _study_folder(Path(spec.outputs), parent)
    note = outbox.load(folder) if folder and spec.tracking.enabled else None
    if folder is None or note is None:
        return
    note.summary = {k: float(v) for k, v in metrics.items()}
    note.answer = redact(answer)
    note.tags[outbox.NOTE] = redact(study_description.answer(folder, note) or note.tags.get(outbox.NOTE, ""))
    _add_report(folder, note)
    note.end("FINISHED" if ok else "FAILED", outbox.now_ms())
    note.save(folder)
    if _send_study(spec, Outbox(folder, note), CLOSE_S):
        sync(folder, spec, SYNC_S)


def run_of(folder: Path) -> str | None:
    """Return the id of a study's run, as its folder knows it."""
    note = outbox.load(folder)
    return note.run_id if note is not None else None


def _add_report(folder: Path, note: Ledger) -> None:
    pairs: list[list[str | None]] = [[name, None] for name in REPORTS if (folder / name).exists()]
    note.artifacts += [pair for pair in pairs if pair not in note.artifacts]


def send_report(folder: Path) -> str:
    """Log a study's report to its run, whether that has ended or not; return why MLflow lacks it, or nothing."""
    note = outbox.load(folder)
    if note is None or not note.uri:
        return ""
    _add_report(folder, note)
    note.behind = True
    note.save(folder)
    counts = SyncCounts()
    try:
        _catch_up(Mirror(note.uri), folder, counts)
    except (MlflowDown, MlflowRefused, OSError) as error:
        return str(error)
    return "another process is sending this study" if counts.busy else ""


def _send_study(spec: TrialSpec, box: Outbox, seconds: float) -> bool:
    box.closed = True
    box.save()
    return _sender(store_uri(spec)).finish(box, seconds, stall_s=seconds)


def _study_folder(outputs: Path, run_id: str | None) -> Path | None:
    for path in outputs.glob(f"*/{outbox.NAME}"):
        note = outbox.load(path.parent)
        if run_id and note and note.run_id == run_id:
            return path.parent
    return None


def _take_up(folder: Path, experiment: str, name: str, tags: Mapping[str, str], kind: str) -> Ledger:
    """Return what the folder remembers, ready to go on, or a fresh ledger."""
    note = outbox.load(folder) or Ledger(experiment=experiment, name=redact(name), kind=kind)
    note.tags |= {k: redact(v) for k, v in tags.items()}
    note.began_ms = outbox.now_ms()
    note.status, note.ended_ms, note.behind = None, None, True
    return note


# --- a trial ---------------------------------------------------------------------------------------------------------


def start_trial(
    folder: Path,
    spec: TrialSpec,
    parent: str | None,
    name: str,
    tags: Mapping[str, str],
    from_step: int | None = None,
    evaluated: int | None = None,
) -> "TrialRun":
    """Return the trial's log, with a child run of `parent` where tracking is on.

    A trial that has begun before goes on in its run. from_step=N: it goes on from a checkpoint at step N, so that the
    points of later steps are dropped; 0 drops all of them. `evaluated` is the
    last step whose evaluation it knows.
    """
    outbox.drop_after(folder / outbox.POINTS, from_step, evaluated)
    if not spec.tracking.enabled:
        return TrialRun(folder)
    note = _take_up(folder, spec.tracking.experiment, name, tags, "trial")
    note.parent = note.parent or parent
    if from_step is not None:
        note.covered = from_step if from_step > 0 else -1
    box = Outbox(folder, note)
    box.save()
    sender = _sender(store_uri(spec))
    sender.submit(box)
    machine = system_metrics.watch() if spec.tracking.system_metrics else None
    return TrialRun(folder, box, sender, machine, math.inf if from_step is None else from_step)


class TrialRun:
    """The log of one trial: metrics.jsonl, and its MLflow run where there is one. No method waits for MLflow but
    `close`, and that for some seconds at most."""

    def __init__(
        self,
        folder: Path,
        box: Outbox | None = None,
        sender: Sender | None = None,
        machine: system_metrics.Watch | None = None,
        after: float = 0,
    ) -> None:
        """`after` is the step that it goes on from."""
        self._folder = folder
        self._file = (folder / outbox.POINTS).open("a", encoding="utf8")
        self._box = box
        self._sender = sender
        self._machine = machine
        self._seen = time.monotonic()
        self._seen_at = after
        """The step of the last look at the machine: a step has one."""

    @property
    def run_id(self) -> str | None:
        """The MLflow run's id, None as long as there is none."""
        return self._box.ledger.run_id if self._box else None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step to the file, at once; MLflow has them when the step is covered.

        A new look at the machine goes along, so that it has the step's fate when a trial goes back.
        """
        found = self._machine.newer(self._seen) if self._machine and step > self._seen_at else None
        if found:
            self._seen, self._seen_at, values = found.taken, step, {**values, **found.values}
        self._file.write(json.dumps({"step": step, "time_ms": outbox.now_ms(), **values}) + "\n")
        self._file.flush()

    def covered(self, step: int) -> None:
        """Let MLflow have the points up to this step: a checkpoint holds it, so they are not written again."""
        if self._box and self._sender:
            with self._box.lock:
                self._box.ledger.covered = max(step, self._box.ledger.covered)
            self._sender.submit(self._box)

    def params(self, spec: TrialSpec, swept: Mapping[str, Any]) -> None:
        """Log every setting that has a value, lora_alpha as it works out, and the swept keys.

        A server takes neither null nor an empty string.
        """
        if not self._box:
            return
        values = flattened(spec.to_dict()) | {"lora.lora_alpha": spec.lora.alpha} | dict(swept)
        with self._box.lock:
            self._box.ledger.params |= {k: redact(str(v)) for k, v in values.items() if v not in (None, "")}
        self._box.save()

    def dataset(self, rows: Data, spec: TrialSpec) -> None:
        """Log the data set as an input, with its fingerprint as digest (MLflow takes 36 characters of it)."""
        profile = json.dumps({"rows": {k: len(v) for k, v in rows.splits.items()}, "fingerprint": rows.fingerprint})
        if self._box:
            self._box.ledger.dataset = {
                "name": redact(rows.name),
                "digest": rows.fingerprint[:32],
                "source_type": spec.data.source,
                "source": redact(spec.data.path or "builtin"),
                "profile": profile,
            }

    def artifact(self, path: Path, name: str | None = None) -> None:
        """Log a file, or what is in a folder under `name`; it is read when it is sent."""
        inside = path.is_relative_to(self._folder)
        entry = [str(path.relative_to(self._folder) if inside else path.resolve()), name]
        if self._box and entry not in self._box.ledger.artifacts:
            with self._box.lock:
                self._box.ledger.artifacts.append(entry)

    def tag(self, key: str, value: str) -> None:
        if self._box:
            with self._box.lock:
                self._box.ledger.tags[key] = redact(value)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED once all is sent; what does not arrive in time is left behind.

        KILLED waits for nothing: who takes the machine away does not wait either.
        """
        self._file.close()
        if not (self._box and self._sender):
            return
        with self._box.lock:
            result = read_result(self._folder) if status != "KILLED" else None
            if result is not None:
                outbox.summarise(self._box.ledger, result)
            self._box.ledger.end(status, outbox.now_ms())
            self._box.closed = True
        self._box.save()
        if status == "KILLED":
            self._sender.submit(self._box, now=True)
        else:
            self._sender.finish(self._box, CLOSE_S)

    def leave(self) -> None:
        """Stop without an end: another process has the trial now, and its run."""
        self._file.close()
        if self._box and self._sender:
            self._sender.leave(self._box)


def _sender(uri: str) -> Sender:
    if uri not in _senders:
        if not _senders:
            atexit.register(flush)
        _senders[uri] = Sender(uri)
    return _senders[uri]


def flush(seconds: float = EXIT_S) -> int:
    """Wait until MLflow has what is covered, for some seconds at most; return how many runs still wait for that.

    A process that may end without Python's exit handlers calls it at its end.
    """
    return sum(sender.drain(seconds) for sender in _senders.values())


# --- what MLflow missed ----------------------------------------------------------------------------------------------


@dataclass
class SyncCounts:
    """What a sync did, in runs, and points sent."""

    runs: int = 0
    """Runs that the study's folders know of, the study's own among them."""
    sent: int = 0
    """Runs brought up to their folder."""
    points: int = 0
    open: int = 0
    """Trials that have not ended: MLflow has what is covered."""
    busy: int = 0
    """Folders that another process is sending."""
    failed: int = 0
    """Runs that MLflow refused, or did not answer for."""
    problem: str = ""

    def __str__(self) -> str:
        rest = {"not ended": self.open, "busy in another process": self.busy, "failed": self.failed}
        told = "".join(f", {n} {what}" for what, n in rest.items() if n)
        line = f"{self.sent} of {self.runs} runs were behind and are sent now, with {self.points} points{told}"
        return f"{line}: {self.problem}" if self.problem else line


def sync(folder: Path, where: TrialSpec | str, seconds: float = float("inf")) -> SyncCounts:
    """Send what MLflow lacks of a study and its trials; doing it again changes nothing.

    `where` is a spec or a URI; another store than before is given everything. A trial that was killed after its
    result.json was written is ended with it; one that has not ended keeps its status. Stops after some seconds.
    """
    uri = where if isinstance(where, str) else where.tracking.uri or default_uri(str(folder.parent))
    counts = SyncCounts()
    deadline = time.monotonic() + seconds
    mirror: Mirror | None = None
    study = outbox.load(folder)
    moved = study is not None and study.uri not in ("", redact(uri).rstrip("/"))
    for path in [folder, *sorted(p.parent for p in folder.glob(f"*/{outbox.NAME}"))]:
        note = outbox.load(path)
        if note is None:
            continue
        counts.runs += 1
        if not _behind(note, uri) or time.monotonic() > deadline:
            continue
        try:
            mirror = mirror or Mirror(uri)
            _catch_up(mirror, path, counts)
        except (MlflowRefused, OSError) as error:
            counts.failed, counts.problem = counts.failed + 1, str(error)
        except MlflowDown as error:
            counts.failed, counts.problem = counts.failed + 1, str(error)
            break
    if moved and mirror and not counts.failed:
        _retell(mirror, folder, counts)
    return counts


def _retell(mirror: Mirror, folder: Path, counts: SyncCounts) -> None:
    """Let the note of a study that has ended lead to its runs where they are now."""
    taken = outbox.take(folder)
    note = outbox.load(folder)
    if taken is None or note is None:
        return
    box = Outbox(folder, note, live=False, taken=taken)
    try:
        text = redact(study_description.answer(folder, note)) if note.status else ""
        if text:
            note.tags[outbox.NOTE], note.behind = text, True
            mirror.push(box)
    except (MlflowRefused, MlflowDown, OSError) as error:
        counts.failed, counts.problem = counts.failed + 1, str(error)
    finally:
        box.release()


def _behind(note: Ledger, uri: str) -> bool:
    return note.behind or note.uri != redact(uri).rstrip("/")


def _catch_up(mirror: Mirror, folder: Path, counts: SyncCounts) -> None:
    """Push one folder, unless another process is sending it or has just done so."""
    taken = outbox.take(folder)
    note = outbox.load(folder)
    if taken is None or note is None:
        counts.busy += 1
        return
    box = Outbox(folder, note, live=False, taken=taken)
    try:
        over = outbox.ended(folder, note)
        counts.points += mirror.push(box)
        counts.sent += over
        counts.open += not over
    finally:
        box.release()

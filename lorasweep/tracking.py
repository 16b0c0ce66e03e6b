"""Events to metrics.jsonl and MLflow, which is best effort and never stops a trial. The owner of mlflow.

Runs are made with MlflowClient and explicit ids: a fluent run would raise on exit when its server is gone.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorasweep.data import Data
from lorasweep.spec import TrialSpec

log = logging.getLogger("lorasweep.tracking")

BUFFER = 200
"""Points that wait for one log_batch."""
FLUSH_S = 5.0

KEY_CONFIG = {
    "model": ("pretrained",),
    "task_type": ("name",),
    "lora": ("r", "lora_dropout", "target_modules", "bias", "use_rslora", "init_lora_weights"),
    "data": ("source", "path", "max_tokens"),
    "train": ("learning_rate", "batch_size", "epochs", "max_steps", "lr_scheduler_type", "weight_decay", "seed"),
}
"""The params of every run, besides the swept keys."""


def default_uri(outputs: str) -> str:
    """Return the SQLite store in the outputs folder."""
    return f"sqlite:///{Path(outputs).resolve()}/mlflow.db"


def store_uri(spec: TrialSpec) -> str:
    return spec.tracking.uri or default_uri(spec.outputs)


def open_study(spec: TrialSpec, name: str, note: str) -> str | None:
    """Create database, experiment and parent run, before any worker starts; return the parent's id, None when off."""
    if not spec.tracking.enabled:
        return None
    from mlflow.utils.mlflow_tags import MLFLOW_RUN_NAME, MLFLOW_RUN_NOTE

    client = _client(store_uri(spec))
    experiment = client.get_experiment_by_name(spec.tracking.experiment)
    if experiment is None:
        local = spec.tracking.uri is None
        where = (Path(spec.outputs).resolve() / "mlartifacts").as_uri() if local else None
        experiment_id = client.create_experiment(spec.tracking.experiment, artifact_location=where)
    else:
        experiment_id = experiment.experiment_id
    tags = {MLFLOW_RUN_NAME: name, MLFLOW_RUN_NOTE: note, "study": name, "kind": "study"}
    return client.create_run(experiment_id, tags=tags).info.run_id


def close_study(spec: TrialSpec, parent: str | None, metrics: Mapping[str, float], ok: bool) -> None:
    """End the parent run with the winner's metrics."""
    if parent:
        run = TrialRun(Path(spec.outputs), store_uri(spec), parent, file=False)
        run.metrics(0, metrics)
        run.close("FINISHED" if ok else "FAILED")


def start_trial(folder: Path, spec: TrialSpec, parent: str | None, name: str, tags: Mapping[str, str]) -> "TrialRun":
    """Return the trial's log, with a child run of `parent` where tracking is on."""
    run_id = None
    if parent:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NAME

        def create() -> str:
            client = _client(store_uri(spec))
            experiment_id = client.get_run(parent).info.experiment_id
            wanted = {MLFLOW_RUN_NAME: name, MLFLOW_PARENT_RUN_ID: parent, **tags}
            return client.create_run(experiment_id, tags=wanted).info.run_id

        run_id = _best_effort("create a run", create)
    return TrialRun(folder, store_uri(spec), run_id)


class TrialRun:
    """The log of one trial: metrics.jsonl, and its MLflow run where there is one."""

    def __init__(self, folder: Path, uri: str, run_id: str | None, *, file: bool = True) -> None:
        self.run_id = run_id
        self._client = _client(uri) if run_id else None
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf8") if file else None
        self._waiting: list[Any] = []
        self._flushed = time.monotonic()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step to the file at once and to MLflow in batches."""
        now = int(time.time() * 1000)
        if self._file:
            self._file.write(json.dumps({"step": step, "time_ms": now, **values}) + "\n")
            self._file.flush()
        if self._client:
            from mlflow.entities import Metric

            self._waiting += [Metric(k, float(v), now, step) for k, v in values.items()]
            if len(self._waiting) >= BUFFER or time.monotonic() - self._flushed > FLUSH_S:
                self._flush()

    def params(self, spec: TrialSpec, swept: Mapping[str, Any]) -> None:
        """Log the key config and the swept keys."""
        if not self._client:
            return
        from mlflow.entities import Param

        tree = spec.to_dict()
        values = {f"{section}.{k}": tree[section][k] for section, keys in KEY_CONFIG.items() for k in keys}
        values["lora.lora_alpha"] = spec.lora.alpha
        values |= swept
        entries = [Param(k, str(v)) for k, v in values.items() if v is not None]
        self._send("log params", lambda c: c.log_batch(self.run_id, params=entries))

    def dataset(self, rows: Data, spec: TrialSpec) -> None:
        """Log the data set as an input, with its fingerprint as digest (MLflow takes 36 characters of it)."""
        if not self._client:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps({"rows": {k: len(v) for k, v in rows.splits.items()}, "fingerprint": rows.fingerprint})
        entry = Dataset(
            rows.name, rows.fingerprint[:32], spec.data.source, spec.data.path or "builtin", profile=profile
        )
        inputs = [DatasetInput(entry, [InputTag("mlflow.data.context", "training")])]
        self._send("log the data set", lambda c: c.log_inputs(self.run_id, datasets=inputs))

    def artifact(self, path: Path, name: str | None = None) -> None:
        """Log a file, or a folder under `name`."""
        if path.is_dir():
            self._send("log a folder", lambda c: c.log_artifacts(self.run_id, str(path), name))
        else:
            self._send("log a file", lambda c: c.log_artifact(self.run_id, str(path), name))

    def tag(self, key: str, value: str) -> None:
        self._send("set a tag", lambda c: c.set_tag(self.run_id, key, value))

    def close(self, status: str) -> None:
        """Flush and end the run as FINISHED, FAILED or KILLED."""
        self._flush()
        self._send("end a run", lambda c: c.set_terminated(self.run_id, status))
        if self._file:
            self._file.close()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        for start in range(0, len(waiting), 1000):
            part = waiting[start : start + 1000]
            self._send("log metrics", partial(_log_metrics, run_id=self.run_id, metrics=part))

    def _send(self, what: str, call: Callable[[Any], Any]) -> None:
        if self._client:
            client = self._client
            _best_effort(what, lambda: call(client))


def _log_metrics(client: Any, run_id: str | None, metrics: list[Any]) -> None:
    client.log_batch(run_id, metrics=metrics)


def _client(uri: str) -> Any:
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def _best_effort(what: str, call: Callable[[], Any]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except (MlflowException, OSError) as error:
        log.warning("MLflow could not %s (%s); the trial's folder has it", what, str(error).splitlines()[0])
        return None

"""Trials that log to MLflow without training."""

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

from lorasweep.config import compose
from lorasweep.config.spec import TrialSpec
from lorasweep.tracking import runs

TAGS = {"kind": "trial", "state": "RUNNING"}
VALUES = {"train_loss": 0.5, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_s": 9.0, "epoch": 0.1}


def made(outputs: Path, uri: str | None = None) -> TrialSpec:
    own = [f"tracking.uri={uri}"] if uri else []
    return compose.compose_trial([f"outputs={outputs}", "tracking.system_metrics=false", *own])


def start(spec: TrialSpec, parent: str | None, number: int = 0, **rest) -> runs.TrialRun:
    folder = Path(spec.outputs) / "s" / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    return runs.start_trial(folder, spec, parent, f"{number} r=8", TAGS, **rest)


def write(run: runs.TrialRun, first: int, last: int, value: float = 0.5) -> None:
    for step in range(first, last + 1):
        run.metrics(step, VALUES | {"train_loss": value})


def runs_in(uri: str, status: str | None = None) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("lorasweep")
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return [r for r in found if status in (None, r.info.status)]

"""Workers are killed at random moments; nothing is lost, nothing is done twice, the numbers are those of a calm run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from lorasweep.study.study import Study

FAULTS = Path(__file__).resolve().parents[1] / "support" / "faults.py"

FEW, ALL = "1,2", "1,2,3,4,5,6"
"""Ranks of a study of 8 trials and of one of 24."""
KILLS = {FEW: 10, ALL: 30}
LOWEST = 0.1
"""Accuracy below which the threshold pruner ends a trial; some of the trials fall below it."""

EXACT = ("train_loss", "eval_accuracy", "eval_loss", "grad_norm", "learning_rate", "params_")
"""Logged values that no interruption may change; times may."""

SETTING = [
    "train.learning_rate=0.0003,0.003",
    "lora.lora_dropout=0.0,0.2",
    "train.max_steps=10",
    "train.eval_every=3",
    "train.batch_size=8",
    "data.max_train_samples=64",
    "data.max_eval_samples=32",
    "train.device=cpu",
    "train.slots=1",  # who shares a pass decides how sums are rounded
    "search.checkpoint_s=0",
    "search.max_retries=1000",
    "search.pruner=threshold",
    f"search.lower={LOWEST}",
    "search.min_complete=0",  # who has reported already depends on the kills
    "tracking.reload_check=false",
]

pytestmark = pytest.mark.integration

MAKE = """
import sys
from lorasweep.runner import plan
from lorasweep.runner.request import Request
from lorasweep.study.study import Study
from lorasweep.tracking import runs

plan = plan.plan(Request.of(sys.argv[1:]))
study = Study.create(plan.folder, plan.meta, plan.queue)
study.set_parent(runs.open_study(plan.first, plan.meta.name, "faults"))
"""


def python(*arguments: str) -> str:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, check=False, timeout=1500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def run(model: Path, outputs: Path, name: str, ranks: str, seed: int, kills: int, workers: int, *more: str) -> int:
    """Make a study and run it under fire; return how many workers died."""
    own = [
        f"lora.r={ranks}",
        f"model.pretrained={model}",
        f"outputs={outputs}",
        f"study={name}",
        *more,
    ]
    python("-c", MAKE, *SETTING, *own)
    said = python("-P", str(FAULTS), str(outputs / name), str(seed), str(kills), str(workers))
    print(said)
    found = re.search(r"killed=(\d+)", said)
    assert found
    return int(found.group(1))


def points(folder: Path) -> list[tuple]:
    """Return what a trial logged at each step, times left out; each point must stand there once."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], k, v) for line in lines for k, v in line.items() if k not in ("step", "time_ms")]
    assert len({f[:2] for f in found}) == len(found)
    return sorted(f for f in found if f[1].startswith(EXACT))


def same_as_calm(calm: Study, stormy: Study) -> None:
    """Every trial has ended once, in the same way and with the same numbers."""
    assert [t.state.name for t in stormy.trials()] == [t.state.name for t in calm.trials()]
    assert {t.state.name for t in calm.trials()} == {"COMPLETE", "PRUNED"}
    for a, b in zip(calm.trials(), stormy.trials(), strict=True):
        assert a.user_attrs["swept"] == b.user_attrs["swept"]
        assert a.values == b.values
        assert points(calm.trial_folder(a.number)) == points(stormy.trial_folder(b.number))


def mlflow_agrees(study: Study, outputs: Path) -> None:
    """MLflow holds one run a trial, with its state and each of its points once."""
    python("-m", "lorasweep", "sync", str(study.folder))
    client = mlflow.MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    experiment = client.get_experiment_by_name("lorasweep")
    runs = client.search_runs([experiment.experiment_id], f"tags.study = '{study.meta.name}'", max_results=1000)
    children = {r.data.tags["trial"]: r for r in runs if r.data.tags["kind"] == "trial"}
    assert len(children) == len(runs) - 1 == len(study.trials())
    for trial in study.trials():
        run = children[str(trial.number)]
        assert run.info.status == "FINISHED"
        assert run.data.tags["state"] == trial.state.name
        for key in ("train_loss", "eval_accuracy"):
            history = client.get_metric_history(run.info.run_id, key)
            mine = [(s, v) for s, k, v in points(study.trial_folder(trial.number)) if k == key]
            assert sorted((m.step, m.value) for m in history) == mine
        assert run.data.metrics["objective"] == pytest.approx(trial.values[0])


@pytest.fixture(scope="module")
def calm_few(tiny_bert, tmp_path_factory) -> Study:
    return calm_run(tiny_bert, tmp_path_factory, FEW)


@pytest.fixture(scope="module")
def calm(tiny_bert, tmp_path_factory) -> Study:
    return calm_run(tiny_bert, tmp_path_factory, ALL)


def calm_run(tiny_bert: Path, folders: pytest.TempPathFactory, ranks: str) -> Study:
    outputs = folders.mktemp("calm")
    assert run(tiny_bert, outputs, "calm", ranks, 0, 0, 1) == 0
    return Study.open(outputs / "calm")


def under_fire(tiny_bert: Path, calm: Study, ranks: str, outputs: Path, seed: int, *more: str) -> None:
    died = run(tiny_bert, outputs, f"storm{seed}", ranks, seed, KILLS[ranks], 4, *more)
    assert died >= KILLS[ranks]
    study = Study.open(outputs / f"storm{seed}")
    same_as_calm(calm, study)
    mlflow_agrees(study, outputs)


def test_killed_workers_lose_nothing(tiny_bert, calm_few, tmp_path):
    under_fire(tiny_bert, calm_few, FEW, tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_killed_workers_lose_nothing_whatever_the_moments(tiny_bert, calm, tmp_path, seed):
    under_fire(tiny_bert, calm, ALL, tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_killed_workers_lose_nothing_on_postgres(tiny_bert, calm, tmp_path, seed, postgres):
    under_fire(tiny_bert, calm, ALL, tmp_path, seed, f"search.storage={postgres}")

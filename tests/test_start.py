"""What a command imports: the light ones no torch, and nothing imports what it does not use."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from support import studies

from lorasweep.study.result import read_result
from lorasweep.study.study import Study

HEAVY = ("torch", "transformers", "peft", "mlflow", "pandas", "scipy", "sklearn", "datasets", "pyarrow", "bitsandbytes")
MOST_MODULES = 1200
"""Imported before the first line is on the screen; Hydra, Optuna and numpy are most of them."""

COMMAND = """
import sys
from lorasweep.cli.main import main
main(sys.argv[1:])
found = [name for name in {heavy} if name in sys.modules]
print("HEAVY", *found)
print("MODULES", len(sys.modules))
"""

PLANNED = """
import sys
from lorasweep.runner import launch, plan, reclaim, resume
from lorasweep.runner.points import points
from lorasweep.runner.request import Request
from lorasweep.report import terminal
from lorasweep.runner import cleanup
assert len(points(Request.of(["lora.r=4,8"])).specs) == 2
found = [name for name in {heavy} if name in sys.modules]
print("HEAVY", *found)
print("MODULES", len(sys.modules))
"""


COMMAND_OF_A_SWEEP = """
import sys
from lorasweep.cli.main import main
code = main(sys.argv[1:])
print("HEAVY", *[name for name in ("torch", "transformers", "peft", "datasets") if name in sys.modules])
print("MODULES", len(sys.modules))
sys.exit(code)
"""


def _imported(script: str, *words: str) -> tuple[list[str], int]:
    """Return which heavy packages a fresh Python has imported, and how many modules."""
    command = [sys.executable, "-c", script.format(heavy=HEAVY), *words]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.splitlines()
    heavy, count = (line.split()[1:] for line in lines if line.startswith(("HEAVY", "MODULES")))
    return heavy, int(count[0])


@pytest.mark.integration
@pytest.mark.parametrize(
    "words",
    [["--help"], ["keys", "lora"], ["status", "study=none"], ["lora.rr=3"], ["-m", "lora.r=0"], ["trian"]],
    ids=" ".join,
)
def test_command_that_trains_nothing_imports_nothing_heavy(words: list[str]) -> None:
    heavy, count = _imported(COMMAND, *words)
    assert not heavy
    assert count < MOST_MODULES


@pytest.mark.integration
def test_points_are_composed_and_a_study_is_steered_without_torch() -> None:
    heavy, count = _imported(PLANNED)
    assert not heavy
    assert count < MOST_MODULES


@pytest.mark.integration
@pytest.mark.parametrize("workers", [1, 2])
def test_command_of_a_sweep_has_its_study_looked_at_trained_scored_and_logged_without_torch(
    tiny_bert: Path, tmp_path: Path, workers: int
) -> None:
    words = [f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", "study=s", f"search.workers={workers}"]
    heavy, _ = _imported(COMMAND_OF_A_SWEEP, "-m", "lora.r=1,2", *studies.SMALL, "tracking.reload_check=false", *words)
    assert not heavy
    study = Study.open(tmp_path / "s")
    assert len({trial.user_attrs["owner"]["pid"] for trial in study.trials()}) <= workers
    best = study.best()
    assert best is not None
    result = read_result(study.trial_folder(best.number))
    assert result is not None and result.test is not None and 0 <= result.test["accuracy"] <= 1
    assert (study.folder / "model.json").exists() and study.meta.mlflow_parent


SAME_SECOND = """
import sys
from lorasweep.study import meta
meta.new_name = lambda keys: "20300101-000000"
from lorasweep.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.integration
def test_two_commands_begun_in_one_second_both_run_and_are_both_in_mlflow(tiny_bert: Path, tmp_path: Path) -> None:
    words = [f"model.pretrained={tiny_bert}", f"outputs={tmp_path}", *studies.SMALL, "tracking.reload_check=false"]
    command = [sys.executable, "-c", SAME_SECOND, *words]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert not any("Traceback" in text for text in said)
    names = {path.parent.name for path in tmp_path.glob("*/study.json")}
    assert len(names) == 2
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    of_studies = {run.info.run_name: run.info.run_id for run in runs if run.data.tags["kind"] == "study"}
    parents = [run.data.tags["mlflow.parentRunId"] for run in runs if run.data.tags["kind"] != "study"]
    assert of_studies.keys() == names
    assert sorted(parents) == sorted(of_studies.values())
    assert {run.info.status for run in runs} == {"FINISHED"}

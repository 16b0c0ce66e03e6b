"""What a command imports: the light ones no torch, and nothing imports what it does not use."""

import subprocess
import sys

import pytest

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

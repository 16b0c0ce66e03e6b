"""The faults of tests/mutants.md fit the code as it is, and the tests catch them."""

import subprocess

import pytest
from support import mutants


@pytest.mark.parametrize("fault", mutants.faults(), ids=lambda fault: fault.title)
def test_planted_fault_has_its_place_and_its_tests(fault):
    assert fault.diff and fault.tests
    again = f"its diff in {mutants.PAGE.name} has to follow the code"
    checked = subprocess.run(
        ["git", "apply", "--check", "-"], cwd=mutants.ROOT, input=fault.diff, text=True, check=False
    )
    assert checked.returncode == 0, again
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (mutants.ROOT / file).read_text(encoding="utf8"), test


@pytest.mark.slow
@pytest.mark.integration
def test_every_planted_fault_is_caught():
    assert mutants.main() == 0

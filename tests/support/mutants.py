"""Faults planted on purpose, to see that the tests catch them: `python tests/support/mutants.py`.

tests/mutants.md holds each fault as a diff, with the tests that must fail. They pass without it, in a scratch worktree
of the files as git tracks them here, changes included; then each diff is applied there and the tests have to fail.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "tests" / "mutants.md"

OUTCOME = re.compile(r"^(PASSED|FAILED) (tests/\S+?\.py::\S+)", re.MULTILINE)
"""A line of pytest's summary. An error is no failure: a fault that stops the import proves nothing."""


@dataclass(frozen=True)
class Fault:
    title: str
    diff: str
    tests: tuple[str, ...]


def faults(page: Path = PAGE) -> list[Fault]:
    """Return the faults of a page: a section each, with a list of tests and a diff."""
    found = []
    for section in re.split(r"^## ", page.read_text(encoding="utf8"), flags=re.MULTILINE)[1:]:
        tests = re.findall(r"^- `(tests/.+?)`", section, re.MULTILINE)
        diffs = re.findall(r"^```diff\n(.+?)^```$", section, re.MULTILINE | re.DOTALL)
        found.append(Fault(section.partition("\n")[0], "".join(diffs), tuple(tests)))
    return found


def git(*words: str, folder: Path = ROOT, stdin: str = "") -> str:
    """Return what git says. Raises subprocess.CalledProcessError where it refuses."""
    command = ["git", *words]
    return subprocess.run(command, cwd=folder, input=stdin, capture_output=True, text=True, check=True).stdout.strip()


def plant(fault: Fault, folder: Path) -> None:
    """Apply a fault in a worktree. Raises subprocess.CalledProcessError where its place is not there any more."""
    git("apply", "-", folder=folder, stdin=fault.diff)


@contextmanager
def scratch(commit: str = "") -> Iterator[Path]:
    """Yield a worktree of a commit, by default of the tracked files as they are here."""
    with tempfile.TemporaryDirectory(prefix="mutants") as parent:
        folder = Path(parent) / "checkout"
        git("worktree", "add", "--detach", str(folder), commit or git("stash", "create") or "HEAD")
        try:
            yield folder
        finally:
            git("worktree", "remove", "--force", str(folder))


def outcomes(tests: Sequence[str], folder: Path) -> dict[str, str]:
    """Return PASSED or FAILED by test; one that did neither is not there."""
    # No bytecode: a fault may be as long as what it replaces, and be planted within the same second.
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-rpf", "--tb=no", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return {name: outcome for outcome, name in OUTCOME.findall(done.stdout)}


def row(title: str, tests: Sequence[str], found: dict[str, str], wanted: str, began: float) -> bool:
    """Print a row of the table; return whether all tests came out as wanted."""
    good = [t for t in tests if found.get(t) == wanted]
    print(f"{title:72} {len(good)} of {len(tests)} {wanted.lower()} {time.perf_counter() - began:5.0f} s", flush=True)
    for test in tests:
        if test not in good:
            print(f"  {found.get(test, 'no outcome')}: {test}", flush=True)
    return len(good) == len(tests)


def main(page: Path = PAGE, commit: str = "") -> int:
    """Plant each fault and print what the tests say of it; return 1 where one is not caught."""
    planted = faults(page)
    named = list(dict.fromkeys(test for fault in planted for test in fault.tests))
    with scratch(commit) as folder:
        began = time.perf_counter()
        good = row("(no fault)", named, outcomes(named, folder), "PASSED", began)
        for fault in planted:
            began = time.perf_counter()
            plant(fault, folder)
            good &= row(fault.title, fault.tests, outcomes(fault.tests, folder), "FAILED", began)
            git("checkout", "--", ".", folder=folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*(Path(p) for p in sys.argv[1:2]), *sys.argv[2:3]))

"""Studies that run in processes which tests may kill, and what is to be seen of them."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from lorasweep.study.study import Study

ZYGOTE = Path(__file__).with_name("zygote.py")


class Zygote:
    """A process that has imported everything, and forks."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(ZYGOTE)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def make(self, *words: str) -> Study:
        """Make a study of override strings."""
        return Study.open(Path(self._asked("make", *words)))

    def go_on(self, study: Study) -> psutil.Process:
        """Start a command that runs what is left of a study as `resume` does."""
        return psutil.Process(int(self._asked("go_on", str(study.folder))))

    def _asked(self, *words: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(shlex.join(words), file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something holds. Raises TimeoutError where it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.1)


def trains(study: Study) -> bool:
    """Return whether a trial of a study runs that has been evaluated, in a worker that lives."""
    trials = study.trials()
    return bool(study.owners.alive()) and any(t.state.name == "RUNNING" and t.intermediate_values for t in trials)


def gone(process: psutil.Process) -> bool:
    """Return whether a process has ended, waited for or not."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return the training losses of a trial by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(p["step"], p["train_loss"]) for p in lines if "train_loss" in p]

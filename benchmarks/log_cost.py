"""What logging costs a trial, in CPU time: of training in the log's calls, and of the log's own threads.

    python benchmarks/log_cost.py [overrides ...]

Runs a trial of two steps, which pays for importing MLflow and making its store, then one more (a line of four points a
step, MLflow in SQLite, a look at the machine every 10 s). Prints the CPU seconds of training in the log's calls, of the
thread that sends to MLflow and of the one that looks at the machine, each also in percent of the CPU time of the whole
process, which other work on the machine does not change.
"""

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import psutil

import lorasweep
from lorasweep.tracking import runs

WAITS = ("metrics", "covered", "params", "dataset", "tag", "artifact")
THREADS = {"lorasweep-mlflow": "sends to MLflow", "lorasweep-system": "looks at the machine"}


class Clock:
    """CPU seconds spent in the methods of a trial's log that training waits for."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def timed(self, call: Any) -> Any:
        def inner(*arguments: Any, **named: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*arguments, **named)
            finally:
                self.seconds += time.thread_time() - began

        return inner


def cpu_of_threads() -> dict[str, float]:
    """Return the CPU seconds of our threads so far."""
    names = {t.native_id: t.name for t in threading.enumerate()}
    found = {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}
    return {names[i]: s for i, s in found.items() if names.get(i) in THREADS}


def main() -> None:
    clock = Clock()
    for name in WAITS:
        setattr(runs.TrialRun, name, clock.timed(getattr(runs.TrialRun, name)))
    with tempfile.TemporaryDirectory() as folder:
        lorasweep.run([f"outputs={folder}", "study=first", *sys.argv[1:], "train.max_steps=2"])
        before, clock.seconds = cpu_of_threads(), 0.0
        began = time.process_time()
        result = lorasweep.run([f"outputs={folder}", "study=cost", *sys.argv[1:]])
        whole = time.process_time() - began
        lines = (Path(folder) / "cost" / "0" / "metrics.jsonl").read_text().count("\n")
    spent = {"the log's calls": clock.seconds}
    after = cpu_of_threads()
    spent |= {f"the thread that {what}": after[name] - before[name] for name, what in THREADS.items()}
    told = {k: f"{v:.3f} s ({100 * v / whole:.2f} %)" for k, v in spent.items()}
    known = {"cpu_s": round(whole, 1), "train_s": round(result["train_s"], 1), "steps": result["steps"], "lines": lines}
    once = {"once, importing MLflow and making its store": f"{before['lorasweep-mlflow']:.3f} s"}
    print(json.dumps(known | told | once, indent=1))


if __name__ == "__main__":
    main()

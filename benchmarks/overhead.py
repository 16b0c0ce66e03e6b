"""What a trial costs besides training: claim, spec, folder, MLflow run, tell; and that no trial is claimed twice.

    python benchmarks/overhead.py --trials 100 1000 10000 --workers 4

Runs studies of trials that train nothing. Prints a row a size: milliseconds a trial as the workers saw it (median and
mean of one trial in one process) and of the machine (wall seconds times cores, divided by trials).
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

from lorasweep.runner import plan, worker
from lorasweep.runner.request import Request
from lorasweep.study.study import Study
from lorasweep.tracking import runs


class Idle(worker.Worker):
    """Ends every trial as soon as it has begun."""

    took: list[float]

    def _run_some(self) -> bool:
        running = self._take()
        if running is None:
            return False
        run = running.track()
        run.params(running.spec, running.claimed.swept)
        run.metrics(1, {"eval_accuracy": 0.5})
        result = {"state": "COMPLETE", "reason": "", "steps": 1}
        result["metric"] = {"name": self.study.meta.metric, "value": 0.5, "maximize": True}
        self._finish(running, running.described(result))
        self.took.append(time.perf_counter() - self.since)
        self.since = time.perf_counter()
        return True


def make(folder: str, name: str, trials: int, more: list[str]) -> None:
    """Make a study of so many random trials."""
    space = ["lora.r=interval(4,128)", "train.learning_rate=tag(log,interval(1e-5,3e-3))"]
    own = ["search.sampler=random", f"search.trials={trials}", f"outputs={folder}", f"study={name}", *more]
    planned = plan.plan(Request.of([*space, *own]))
    study = Study.create(planned.folder, planned.meta, planned.queue)
    study.set_parent(runs.open_study(planned.first, planned.meta.name, "queue"))


def live(folder: str, answer: Any) -> None:
    idle = Idle(Study.open(Path(folder)))
    idle.display.begin = idle.display.end = lambda *_: None  # type: ignore[method-assign]
    idle.took, idle.since = [], time.perf_counter()
    idle.run()
    runs.flush()
    answer.put((idle.took, time.perf_counter()))


def measure(trials: int, workers: int, more: list[str]) -> dict[str, Any]:
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        name = f"queue{trials}-{os.getpid()}"
        began = time.perf_counter()
        maker = fork.Process(target=make, args=(folder, name, trials, more))
        maker.start()
        maker.join()
        made = time.perf_counter()
        answer = fork.Queue()
        processes = [fork.Process(target=live, args=(f"{folder}/{name}", answer)) for _ in range(workers)]
        for process in processes:
            process.start()
        answers = [answer.get() for _ in processes]
        wall = max(a[1] for a in answers) - made
        for process in processes:
            process.join()
        study = Study.open(Path(folder) / name)
        logs = [(study.trial_folder(t.number) / "log.txt").read_text() for t in study.trials()]
        ended = Counter(log.count("COMPLETE") for log in logs)
        assert ended == Counter({1: trials}), ended
        assert all(t.state.name == "COMPLETE" for t in study.trials())
    took = [1000 * t for a in answers for t in a[0]]
    cores = min(workers, len(os.sched_getaffinity(0)))
    return {
        "trials": trials,
        "workers": workers,
        "queue_filled_s": round(made - began, 1),
        "median_ms": round(median(took), 1),
        "mean_ms": round(mean(took), 1),
        "machine_ms": round(1000 * wall * cores / trials, 1),
        "wall_ms": round(1000 * wall / trials, 1),
        "claimed_twice": 0,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--workers", type=int, default=4)
    options, more = parser.parse_known_args()
    for trials in options.trials:
        print(json.dumps(measure(trials, options.workers, more)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

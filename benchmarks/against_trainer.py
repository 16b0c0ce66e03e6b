"""A study of ours against the loop people write (trainer_loop.py), over the same trials.

    python benchmarks/against_trainer.py --trials 24 data=csv data.path=FOLDER data.label_column=category \
        data.test_split=test train.batch_size=8

The points of lora_search are drawn by our own studies (random sampler, one seed, so all draw the same; without eva,
whose start looks at data); the loop then trains them. In turn: the first third of the points, ours one trial at a time;
the loop on that third; ours packed, on it too; all points, ours packed in `--workers` processes, each with its part of
the threads; the loop on the second third; ours packed in as many processes, with ASHA; the loop on the last third.
Prints the seconds of whole processes, imports and all (the loop's test scoring and the start of its second and third
process are taken off its time); the ratios to the loop on the same points; the winners' metrics, and the
paired-bootstrap interval of their difference on the whole test split.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pruning import DEFAULTS, correct, interval, run, steps

from lorasweep.study.study import Study

LOST = -0.01
"""More than this much less accurate is not as good."""

SEARCH = Path(__file__).parents[1] / "sweeps" / "lora_search.yaml"
THIRD = {
    "solo": ["search.pruner=none", "train.slots=1"],
    "packed": ["search.pruner=none"],
}
"""Ways that are shown on the first third of the points."""
WHOLE = {"workers": ["search.pruner=none"], "asha": ["search.pruner=asha"]}
"""And on all of them, in several processes."""


def without_eva(path: Path) -> str:
    """Write lora_search without the initialisation that the loop would have to feed with data; return its path."""
    lines = [line for line in SEARCH.read_text().splitlines() if "lora.eva_rho" not in line]
    path.write_text("\n".join(lines).replace(",eva", "") + "\n")
    return str(path)


def trained(folder: Path, trials: list[list[str]]) -> tuple[list[dict], float]:
    """Train trials with Trainer in one process; return what each gave and the process's seconds."""
    many = folder / "trials.json"
    many.write_text(json.dumps(trials))
    script = str(Path(__file__).with_name("trainer_loop.py"))
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, script, "--test", "--many", str(many)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.returncode
    took = time.perf_counter() - began
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"accuracy"')], took


@dataclass
class Loop:
    """Trains a study's trials with Trainer, a part of them at a time."""

    folder: Path
    rows: list[dict] = field(default_factory=list)
    """What each trial gave."""
    seconds: float = 0.0
    """Of one process that would have trained them all, without their test scores."""

    def part(self, study: Study, until: int) -> None:
        """Train its trials up to this number."""
        trials = study.trials()
        some = trials[len(self.rows) : until]
        if not some:
            return
        rows, took = trained(self.folder, [t.user_attrs["overrides"] for t in some])
        start = rows[0]["start_s"] if self.rows else 0.0
        self.seconds += took - sum(r["test_s"] for r in rows) - start
        self.rows += rows


def compared(folder: Path, trials: int, workers: int, overrides: list[str]) -> dict[str, Any]:
    """Run all of it; return what is printed."""
    sweep, third = without_eva(folder / "lora_search.yaml"), math.ceil(trials / 3)
    studies, seconds, trainer, loop = {}, {}, {}, Loop(folder)

    def ours(kind: str, trials: int, *more: str) -> None:
        studies[kind], seconds[kind] = run(folder, kind, [*overrides, f"search.trials={trials}", *more], sweep)
        told()

    def told() -> None:
        print(json.dumps(seconds | {"trainer_so_far": [len(loop.rows), loop.seconds]}), flush=True)

    ours("solo", third, *THIRD["solo"])
    loop.part(studies["solo"], third)
    trainer |= dict.fromkeys(THIRD, loop.seconds)
    ours("packed", third, *THIRD["packed"])
    for i, kind in enumerate(WHOLE):
        ours(kind, trials, *WHOLE[kind], f"search.workers={workers}")
        loop.part(studies["workers"], min(trials, third * (i + 2)))
    told()
    trainer |= dict.fromkeys(WHOLE, loop.seconds)
    assert [t.params for t in studies["solo"].trials()] == [t.params for t in studies["workers"].trials()][:third]
    rows, best = loop.rows, max(loop.rows, key=lambda r: r["accuracy"])
    row = {
        "trials": trials,
        "seconds": {k: round(s, 1) for k, s in seconds.items()},
        "trainer_s": {k: round(s, 1) for k, s in trainer.items()},
        "times_faster": {k: round(trainer[k] / s, 2) for k, s in seconds.items()},
        "trial_s_of_trainer": round(float(np.mean([r["trial_s"] for r in rows])), 2),
        "steps": {k: steps(s) for k, s in studies.items()} | {"trainer": sum(r["steps"] for r in rows)},
        "best_eval": {k: studies[k].best().values[0] for k in WHOLE} | {"trainer": best["accuracy"]},
        "test": {"trainer": float(np.mean(best["right"]))},
        "test_difference_95": {},
    }
    for key in ("train_s", "eval_s"):
        row[key] = {k: round(sum(t.user_attrs[key] for t in s.trials()), 1) for k, s in studies.items()}
    for kind in WHOLE:
        right = correct(studies[kind])
        row["test"][kind] = float(right.mean())
        row["test_difference_95"][kind] = interval(right, np.array(best["right"], dtype=float))
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="where the studies stay; by default they are deleted")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options, overrides = parser.parse_known_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        row = compared(options.folder or Path(name), options.trials, options.workers, [*DEFAULTS, *overrides])
    print(json.dumps(row, indent=1))
    return 0 if all(low > LOST for low, _ in row["test_difference_95"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

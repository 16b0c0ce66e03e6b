"""What pruning saves: one study with search.pruner=asha against the same trials run to their end.

    python benchmarks/pruning.py --trials 24 data=csv data.path=FOLDER data.label_column=category data.test_split=test

Both studies draw the same points (sampler random, one seed), one after another in one process each. Prints the share of
training steps saved, the best trials' eval and test metrics, the paired-bootstrap interval of the test difference, and
the time until the study without pruning had a trial as good, which is also what a sweeper that runs batches without
pruning needs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.study.study import Study
from lorasweep.training import evaluation, workload

DEFAULTS = [
    "data.max_train_samples=2000",
    "data.max_eval_samples=600",
    "train.batch_size=16",
    "train.epochs=2",
    "tracking.reload_check=false",
    "search.sampler=random",
    "search.seed=1",
]
RESAMPLES = 10_000
WHOLE_TEST = ["data.max_eval_samples=null"]
"""Without the limit of a study's evaluations, the test split has all its rows."""


def run(folder: Path, name: str, overrides: list[str], sweep: str = "lora_search") -> tuple[Study, float]:
    """Run a sweep; return the study and its seconds, imports and all."""
    began = time.perf_counter()
    run_command(["--sweep", sweep, *overrides, f"outputs={folder}", f"study={name}"])
    return Study.open(folder / name), time.perf_counter() - began


def run_command(words: list[str]) -> None:
    """Run lorasweep as a user does."""
    done = subprocess.run([sys.executable, "-m", "lorasweep", *words], env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.returncode


def correct(study: Study, number: int | None = None) -> np.ndarray:
    """Return for each row of the whole test split whether a trial of the study, or its best one, is right."""
    best = study.best()
    assert best is not None
    trial = best if number is None else study.trials()[number]
    spec = compose.compose_trial([*trial.user_attrs["overrides"], *WHOLE_TEST])
    work = workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    loaded = adapter.reload(study.trial_folder(trial.number) / "adapter", base, spec.lora, spec.task_type)
    found = evaluation.predict(
        loaded.base_model.model, work.task, work.examples["test"], spec.train, work.tokenizer.pad_token_id
    )
    return np.array([p["prediction"] == p["label"] for p in found], dtype=float)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of mean(a) - mean(b) over rows drawn with replacement, the same ones for both."""
    random = np.random.default_rng(0)
    rows = random.integers(0, len(a), size=(RESAMPLES, len(a)))
    low, high = np.quantile((a - b)[rows].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def steps(study: Study) -> int:
    return sum(t.user_attrs["steps"] for t in study.trials())


def seconds_until(study: Study, value: float) -> float:
    """Return the seconds of a device until a trial reached the value."""
    total = 0.0
    for trial in study.trials():
        total += trial.user_attrs["device_s"]
        if trial.values and trial.values[0] >= value and trial.state.name == "COMPLETE":
            return total
    return float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=24)
    options, overrides = parser.parse_known_args()
    own = [*DEFAULTS, f"search.trials={options.trials}", *overrides]
    with tempfile.TemporaryDirectory() as folder:
        pruned, pruned_s = run(Path(folder), "asha", [*own, "search.pruner=asha"])
        whole, whole_s = run(Path(folder), "none", [*own, "search.pruner=none"])
        a, b = pruned.best(), whole.best()
        assert a is not None and b is not None
        assert [t.user_attrs["swept"] for t in pruned.trials()] == [t.user_attrs["swept"] for t in whole.trials()]
        right_a, right_b = correct(pruned), correct(whole)
        low, high = interval(right_a, right_b)
        row = {
            "trials": options.trials,
            "steps": [steps(pruned), steps(whole)],
            "steps_saved": 1 - steps(pruned) / steps(whole),
            "seconds": [round(pruned_s), round(whole_s)],
            "device_s": [round(pruned.device_s()), round(whole.device_s())],
            "pruned_trials": sum(t.state.name == "PRUNED" for t in pruned.trials()),
            "best_trial": [a.number, b.number],
            "best_eval": [a.values[0], b.values[0]],
            "test": [float(right_a.mean()), float(right_b.mean())],
            "test_difference_95": [low, high],
            "device_s_to_best": [
                round(seconds_until(pruned, a.values[0])),
                round(seconds_until(whole, a.values[0])),
            ],
        }
    print(json.dumps(row, indent=1))
    return 0 if row["steps_saved"] >= 0.6 and low > -0.01 else 1


if __name__ == "__main__":
    sys.exit(main())

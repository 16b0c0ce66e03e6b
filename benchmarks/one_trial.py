"""One lorasweep trial against the loop people write (trainer_loop.py), alternating, same examples and settings.

    python benchmarks/one_trial.py --pairs 3 data=csv data.path=FOLDER data.label_column=category data.test_split=test

Two ratios: the trial alone (first step to the saved adapter; both evaluate after each epoch and log to MLflow), and the
whole process (imports, data and database included; ours also loads its adapter again, evaluates it once more, and
scores the test split).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

DEFAULTS = [
    "data.max_train_samples=2000",
    "data.max_eval_samples=872",
    "train.batch_size=8",
    "train.epochs=2",
    "lora.target_modules=[query,key,value]",
    "lora.lora_dropout=0.1",
]


def ours(overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        where = [f"outputs={folder}", "study=one"]
        command = [sys.executable, "-m", "lorasweep", *overrides, *where]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        took = time.perf_counter() - began
        result = json.loads((Path(folder) / "one" / "0" / "result.json").read_text())
    return {
        "accuracy": result["metrics"]["accuracy"],
        "loss": result["metrics"]["loss"],
        "steps": result["steps"],
        "trial_s": result["train_s"] + result["eval_s"],
        "process_s": took,
        "reload_s": result["reload"]["seconds"],
    }


def theirs(overrides: list[str]) -> dict:
    script = Path(__file__).parent / "trainer_loop.py"
    done = subprocess.run([sys.executable, str(script), *overrides], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    overrides = DEFAULTS + given.overrides
    pairs = []
    for i in range(given.pairs):
        a, b = ours(overrides), theirs(overrides)
        pairs.append((a, b))
        print(f"pair {i}: lorasweep {json.dumps(a)}\n        trainer   {json.dumps(b)}", flush=True)
    for key in ("trial_s", "process_s"):
        ratios = [a[key] / b[key] for a, b in pairs]
        print(
            f"{key}: lorasweep {median(a[key] for a, _ in pairs):.1f} trainer {median(b[key] for _, b in pairs):.1f} "
            f"ratio median {median(ratios):.3f} min {min(ratios):.3f} max {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()

"""One trial with several seeds, ours packed against the loop people write: is the adapter as good, over all seeds?

    python benchmarks/same_quality.py --seeds 0,1,2,3 data=csv data.path=FOLDER data.label_column=category \
        data.test_split=test data.max_train_samples=2000 train.epochs=2 lora.r=87

A single seed's difference is mostly that of other random numbers on the two sides. Prints each seed's accuracy on the
whole test split, the 95 % interval of the difference of the means over seeds (paired bootstrap over test rows, for
these trainings), and the seconds of whole processes, without Trainer's test scores. Exit code 1 where the interval
reaches below -0.01.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from against_trainer import LOST, trained
from pruning import correct, interval, run_command

from lorasweep.study.study import Study


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2,3")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    seeds = [f"train.seed={seed}" for seed in given.seeds.split(",")]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        began = time.perf_counter()
        several = [f"train.seed={given.seeds}", "tracking.reload_check=false"]
        run_command(["-m", *given.overrides, *several, f"outputs={name}", "study=ours"])
        ours_s = time.perf_counter() - began
        study = Study.open(folder / "ours")
        ours_SN = np.stack([correct(study, trial.number) for trial in study.trials()])
        rows, loop_s = trained(folder, [[*given.overrides, seed] for seed in seeds])
    loop_SN = np.array([row["right"] for row in rows], dtype=float)
    low, high = interval(ours_SN.mean(axis=0), loop_SN.mean(axis=0))
    row = {
        "seeds": given.seeds,
        "test_ours": ours_SN.mean(axis=1).round(4).tolist(),
        "test_trainer": loop_SN.mean(axis=1).round(4).tolist(),
        "difference_of_means": round(float(ours_SN.mean() - loop_SN.mean()), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "seconds": {"ours": round(ours_s, 1), "trainer": round(loop_s - sum(r["test_s"] for r in rows), 1)},
    }
    print(json.dumps(row, indent=1))
    return 0 if low > LOST else 1


if __name__ == "__main__":
    sys.exit(main())

"""How long workers wait for trials of unequal length, until the queue is empty.

    python benchmarks/idle.py --workers 2

Prints the busy and the idle seconds of each worker and the idle share of all. Loading the base, evaluating and saving
are work; settling the dead, claiming, drawing a point and waiting for the storage are not.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from lorasweep.study.study import Study

LIMIT = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    options, overrides = parser.parse_known_args()
    lengths = "train.max_steps=5,80,10,40,20,5,60,10,30,5,20,10"
    with tempfile.TemporaryDirectory() as folder:
        own = [f"search.workers={options.workers}", f"outputs={folder}", "study=idle", "tracking.reload_check=false"]
        command = [sys.executable, "-m", "lorasweep", "-m", lengths, *own, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        workers = [w for w in Study.open(Path(folder) / "idle").signals.workers().values() if w["busy_s"]]
    busy, idle = ([w[k] for w in workers] for k in ("busy_s", "idle_s"))
    share = sum(idle) / (sum(busy) + sum(idle))
    print(json.dumps({"busy_s": busy, "idle_s": idle, "idle_share": share}))
    return 0 if share < LIMIT and len(workers) == options.workers else 1


if __name__ == "__main__":
    sys.exit(main())

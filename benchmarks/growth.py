"""What a study's process holds after its 2nd trial and after its 50th: `python benchmarks/growth.py`, a minute or two.

MiniLM, 50 trials of a few steps in 4 slots, saved, evaluated and logged as any study's, ranks 2 to 32 in turn.
`resident` is what the process holds when so many trials have ended, `highest` the most since the line before.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

SWEEP = [
    "train.seed=" + ",".join(map(str, range(10))),
    "lora.r=2,4,8,16,32",
    "lora.lora_dropout=0.1",
    "lora.bias=all",
    "train.slots=4",
    "train.max_steps=6",
    "train.batch_size=4",
    "data.max_train_samples=400",
    "data.max_eval_samples=40",
    "data.max_tokens=64",
    "search.pruner=none",
    "tracking.reload_check=false",
]
TRIALS = 50


def held(pid: int, what: str) -> float:
    """Return MiB from /proc/PID/status: VmRSS, or its highest value VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf8").splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {what} in /proc/{pid}/status")


def milestones(running: subprocess.Popen[bytes], study: Path, after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield each number of `after` once so many trials have ended, and how many had by then."""
    todo = sorted(after)
    while todo:
        if running.poll() is not None:
            raise SystemExit(f"the study ended with {running.returncode} before trial {todo[0]} did")
        ended = len(list(study.glob("*/result.json")))
        if ended >= todo[0]:
            yield todo.pop(0), ended
        time.sleep(0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[2, 10, 25, TRIALS])
    given, overrides = parser.parse_known_args()
    print("| trials ended | resident, MiB | highest since the line before, MiB | s |\n|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        own = [f"outputs={folder}", "study=growth"]
        command = [sys.executable, "-m", "lorasweep", "-m", *SWEEP, *own, *overrides]
        began = time.perf_counter()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as running:
            for _, ended in milestones(running, Path(folder) / "growth", given.after):
                figures = f"{held(running.pid, 'VmRSS'):.0f} | {held(running.pid, 'VmHWM'):.0f}"
                print(f"| {ended} | {figures} | {time.perf_counter() - began:.0f} |", flush=True)
                Path(f"/proc/{running.pid}/clear_refs").write_text("5", encoding="utf8")  # the highest begins anew
        if running.returncode:
            raise SystemExit(f"the study ended with {running.returncode}")


if __name__ == "__main__":
    main()

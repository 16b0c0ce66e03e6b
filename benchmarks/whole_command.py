"""Whole commands, from Enter to the last line: lorasweep against the loop people write (trainer_loop.py), alternating.

    python benchmarks/whole_command.py --runs 5 --steps 120 data=csv data.path=FOLDER data.label_column=category

Three trials (r=4, 16, 64) and one (r=16), on the same examples; the loop once with batches grouped by length, once with
random ones, which cost it padding and give a better model. Then the seconds of commands that train nothing. Prints
Markdown rows: medians, ratios run by run, and the accuracies that the time bought.
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

RANKS = {"three trials": (4, 16, 64), "one trial": (16,)}
SAMPLINGS = ("group_by_length", "random")
SETTINGS = ["train.batch_size=8", "data.max_train_samples=2000", "data.max_eval_samples=500"]
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}


def seconds_of(command: list[str], expected: int = 0) -> tuple[float, str]:
    """Run a command; return its seconds and what it printed."""
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)
    took = time.perf_counter() - began
    assert done.returncode == expected, f"{command} ended with {done.returncode}:\n{done.stdout}"
    return took, done.stdout


def ours(ranks: tuple[int, ...], settings: list[str], folder: Path) -> tuple[float, list[float]]:
    """Return the seconds of a sweep and the eval accuracy of each trial."""
    sweep = ["-m", f"lora.r={','.join(map(str, ranks))}", *settings, f"outputs={folder}", "study=whole"]
    took, _ = seconds_of([sys.executable, "-m", "lorasweep", *sweep])
    results = [json.loads((folder / "whole" / str(i) / "result.json").read_text()) for i in range(len(ranks))]
    return took, [r["metrics"]["accuracy"] for r in results]


def theirs(ranks: tuple[int, ...], settings: list[str], sampling: str, folder: Path) -> tuple[float, list[float]]:
    """Return the same of the loop, in one process."""
    many = folder / "trials.json"
    many.write_text(json.dumps([[f"lora.r={r}", *settings] for r in ranks]))
    script = str(Path(__file__).with_name("trainer_loop.py"))
    took, printed = seconds_of([sys.executable, script, f"--sampling={sampling}", "--many", str(many)])
    rows = [json.loads(line) for line in printed.splitlines() if line.startswith('{"accuracy"')]
    return took, [row["accuracy"] for row in rows]


def shown(accuracies: list[float]) -> str:
    return ", ".join(f"{a:.3f}" for a in accuracies)


def compare(what: str, settings: list[str], runs: int) -> None:
    """Print a row for each sampling of the loop."""
    ranks = RANKS[what]
    seconds: dict[str, list[float]] = {name: [] for name in ("lorasweep", *SAMPLINGS)}
    accuracies: dict[str, list[float]] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            took, accuracies["lorasweep"] = ours(ranks, settings, folder)
            seconds["lorasweep"].append(took)
            for sampling in SAMPLINGS:
                took, accuracies[sampling] = theirs(ranks, settings, sampling, folder)
                seconds[sampling].append(took)
    for sampling in SAMPLINGS:
        ratios = [theirs_s / ours_s for theirs_s, ours_s in zip(seconds[sampling], seconds["lorasweep"], strict=True)]
        print(
            f"| {what}, Trainer {sampling} | {median(seconds['lorasweep']):.1f} | {median(seconds[sampling]):.1f} | "
            f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {shown(accuracies['lorasweep'])} | "
            f"{shown(accuracies[sampling])} |",
            flush=True,
        )


def commands(settings: list[str], runs: int) -> None:
    """Print the seconds of commands that train nothing."""
    program = [sys.executable, "-m", "lorasweep"]
    with tempfile.TemporaryDirectory() as name:
        study = [f"outputs={name}", "study=small"]
        seconds_of([*program, "-m", "lora.r=4,8", *settings, "train.max_steps=2", *study])
        asked = {
            "--help": ([*program, "--help"], 0),
            "a typo (lora.rr=8)": ([*program, "lora.rr=8"], 1),
            "status": ([*program, "status", f"{name}/small"], 0),
            "check": ([*program, "check", "lora.r=8", *settings], 0),
        }
        print("\n| command | seconds |\n|---|--:|")
        for what, (command, expected) in asked.items():
            print(f"| {what} | {median(seconds_of(command, expected)[0] for _ in range(runs)):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    settings = [*SETTINGS, f"train.max_steps={args.steps}", *args.overrides]
    print("| what | lorasweep s | Trainer s | times faster | accuracy, ours | accuracy, Trainer |")
    print("|---|--:|--:|--:|--:|--:|")
    for what in RANKS:
        compare(what, settings, args.runs)
    commands(settings, args.runs)


if __name__ == "__main__":
    main()

"""Epochs with kept states of the frozen layers against epochs without, in turn in one run.

    python benchmarks/prefix.py --layers 5 4,5 3,4,5 1,2,3,4,5 data=csv data.path=FOLDER data.label_column=category \
        data.test_split=test

MiniLM (or the model of the overrides), LoRA r=8 on the linear layers of the given layers, batch 8, an evaluation after
each epoch. Prints a row a setting: optimiser steps a second of both and their ratio (the median of all epochs but the
first, with its range), the ratio of the first epoch, which computes what is kept, and that of the evaluations.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

from lorasweep.config import compose
from lorasweep.models import base_model
from lorasweep.training import engine, workload

DEFAULTS = ["train.batch_size=8", "train.slots=1", "train.device=cpu", "data.max_train_samples=400"]
DEFAULTS += ["data.max_eval_samples=200", "data.max_tokens=64", "train.max_loss_ratio=null"]


def epochs(overrides: list[str]) -> Iterator[tuple[float, float]]:
    """Yield steps a second and seconds of evaluation, an epoch."""
    spec = compose.compose_trial(overrides)
    work = workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    made = engine.Engine(base, work.task, work.prepared())
    made.width, jobs, before = 1, [engine.Job(0, spec)], (0, 0.0)
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.EvalEvent):
            now = (event.step, made.slots[0].train_s)
            yield (now[0] - before[0]) / (now[1] - before[1]), event.eval_s
            before = now


def setting(layers: str, rounds: int, overrides: list[str]) -> str:
    own = [*DEFAULTS, *overrides, f"lora.layers_to_transform=[{layers}]", f"train.epochs={rounds + 1}"]
    pairs = list(zip(epochs(own), epochs([*own, "train.prefix_cache_gib=0"]), strict=True))
    first, *later = [on[0] / off[0] for on, off in pairs]
    first_eval, *later_evals = [off[1] / on[1] for on, off in pairs]
    fast, slow = (median(pair[i][0] for pair in pairs[1:]) for i in (0, 1))
    return (
        f"| {layers} | {fast:.1f} | {slow:.1f} | {median(later):.2f} ({min(later):.2f} to {max(later):.2f}) "
        f"| {first:.2f} | {median(later_evals):.2f} | {first_eval:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=["5", "4,5", "3,4,5", "1,2,3,4,5"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="count this process's CPU seconds: for a busy machine")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    if given.cpu:
        time.perf_counter = time.process_time
    sys.stdout.write(
        "| layers | kept, steps/s | not kept, steps/s | ratio | first epoch | evaluation | first evaluation |\n"
        "|---|--:|--:|--:|--:|--:|--:|\n"
    )
    next(epochs([*DEFAULTS, *given.overrides, "data.max_train_samples=16"]))  # imports what only metrics need
    for layers in given.layers:
        sys.stdout.write(setting(layers, given.rounds, given.overrides) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

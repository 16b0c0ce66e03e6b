"""Trials in one pass against the same trials one at a time: optimiser steps a second, taken in turn in one run.

    python benchmarks/pack.py --batches 1 2 4 8 16 --lengths 16 64 256 --slots 1 2 4 8 16 --rounds 5
    python benchmarks/pack.py --batches 4 --lengths 128 --slots 4 task_type=causal_lm model=smollm2_135m

MiniLM with a classification head (or the model and task of the overrides: seq_cls or causal_lm), random tokens, LoRA on
all linear layers. Prints a row a setting: steps a second of both, the median ratio with its range and its rounds, the
share of the device's matmul peak that the linear layers reach when packed, what a pass costs by itself, and how many
trials `train.slots=auto` would put in one pass; at the end the most memory that the process had.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Iterator
from statistics import median

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.hardware import matmul_peak
from lorasweep.models import base_model
from lorasweep.packing import pass_cost
from lorasweep.tasks.task import Example, Task
from lorasweep.training import engine, workload

LEAST = 3
"""Rounds of a setting."""


def examples(task: Task, length: int, count: int) -> list[Example]:
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(1000, 30_000, (count, length), generator=random).tolist()
    if task.name == "CAUSAL_LM":
        return [Example(i, {"input_ids": ids}, target=ids, supervised=length - 1) for i, ids in enumerate(rows)]
    return [Example(i, {"input_ids": ids}, target=i % 2, supervised=1) for i, ids in enumerate(rows)]


def steps(made: engine.Engine, spec: object, trials: int, width: int) -> Iterator[None]:
    """Yield after each optimiser step of any trial."""
    jobs = [engine.Job(i, spec) for i in range(trials)]
    made.width = width
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.StepEvent):
            yield


def seconds(events: Iterator[None], count: int) -> float:
    began = time.perf_counter()
    for _ in range(count):
        next(events)
    return time.perf_counter() - began


def setting(batch: int, length: int, slots: int, given: argparse.Namespace) -> str:
    fixed = ["train.max_steps=1000000", "train.eval_every=1000000", f"train.batch_size={batch}", "train.device=cpu"]
    spec = compose.compose_trial([*fixed, *given.overrides])
    task = tasks.make(spec.task_type)
    if task.name == "SEQ_CLS":
        task.classes = ["a", "b"]
    tokenizer = base_model.load_tokenizer(spec.model)
    data = examples(task, length, 256)
    prepared = workload.Prepared(data, data[:2], tokenizer.pad_token_id)
    packed, solo = (
        engine.Engine(base_model.load(spec.model, spec.train, task, tokenizer), task, prepared) for _ in range(2)
    )
    together, one = steps(packed, spec, slots, slots), steps(solo, spec, 1, 1)
    for events in (together, one):
        seconds(events, slots)
    count = slots * max(1, round(given.tokens / (batch * length * slots)))
    pairs: list[tuple[float, float]] = []
    while len(pairs) < given.rounds and (len(pairs) < LEAST or sum(map(sum, pairs)) < given.seconds):
        pairs.append((seconds(together, count), seconds(one, count)))
    cost = solo.pass_cost(solo.traits.first_token)
    ratios = [b / a for a, b in pairs]
    fast, slow = (count / median(p[i] for p in pairs) for i in (0, 1))
    width = pass_cost.width(cost, spec.train, data)
    flops = packed.slots[0].flops_a_token
    share = matmul_peak.share(packed.base.model, matmul_peak.rate(flops, round(fast * batch * length), 1.0))
    return (
        f"| {batch} | {length} | {slots} | {fast:.1f} | {slow:.1f} | {median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f}, {len(pairs)}) | {share:.0%} | {cost:.0f} | {width} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a round, about")
    parser.add_argument("--seconds", type=float, default=1e9, help=f"after so many, {LEAST} rounds are enough")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    sys.stdout.write(
        "| batch | length | slots | packed, steps/s | solo, steps/s | ratio | of peak | a pass costs, tokens | auto |\n"
    )
    sys.stdout.write("|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n")
    for batch in given.batches:
        for length in given.lengths:
            for slots in given.slots:
                sys.stdout.write(setting(batch, length, slots, given) + "\n")
                sys.stdout.flush()
    sys.stdout.write(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB\n")


if __name__ == "__main__":
    main()

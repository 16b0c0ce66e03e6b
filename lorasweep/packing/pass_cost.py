"""The fixed cost of a forward and backward pass, beside that of its tokens; how many trials should share one for it.

A pass over N tokens (padding included) takes about a + b N seconds. Costs are in tokens here: a / b is the overhead.
"""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from lorasweep.config.spec import TrainSpec
from lorasweep.tasks.batches import epochs
from lorasweep.tasks.task import Batch, Example, Task, lengths_of

MOST = 8
"""Slots that are chosen at most."""

ENOUGH = 0.05
"""Share of a trial's tokens that its part of the overhead may come to."""

LEAST = 0.2
"""Share of a trial's tokens below which the overhead of a pass is not worth sharing."""

LOOK_AT = 50
"""Batches whose size stands for all."""

TRIES = 5
"""Times that each size is timed, after one that does not count: a process's first passes are slow."""

LONG_S = 2.0
"""Seconds after which once is enough."""

ROUNDS = 3
"""Steps that are timed in one way and in the other; the first of each is not counted."""


class Comparison:
    """Which is faster for the trials in the slots: a pass for all of them or one each. Timed on their own steps."""

    def __init__(self) -> None:
        self._who: tuple[int, ...] = ()
        self._costs: dict[bool, list[float]] = {True: [], False: []}

    def together(self, who: tuple[int, ...]) -> bool:
        """Tell whether these trials take their next step in common passes."""
        if who != self._who:
            self._who, self._costs = who, {True: [], False: []}
        spared = self.spared
        return len(self._costs[True]) <= len(self._costs[False]) if spared is None else spared >= 0

    @property
    def spared(self) -> float | None:
        """Seconds a token that common passes save; None before both ways were timed."""
        common, apart = self._costs[True], self._costs[False]
        if min(len(common), len(apart)) < ROUNDS:
            return None
        return statistics.median(apart[1:]) - statistics.median(common[1:])

    def took(self, together: bool, seconds: float, tokens: int) -> None:
        """Take in what a step of all cost; only the first ones count."""
        if len(self._costs[together]) < ROUNDS:
            self._costs[together].append(seconds / max(1, tokens))


def overhead(model: Any, task: Task, examples: Sequence[Example], pad_id: int, device: torch.device) -> float:
    """Return what a pass costs by itself, in tokens, from the times of a small and a large one.

    Leaves gradients behind.
    """
    lengths = lengths_of(examples)
    order = sorted(range(len(examples)), key=lengths.__getitem__)[len(examples) // 2 :]
    length = lengths[order[0]]
    large = min(len(order), max(4, math.ceil((512 if device.type == "cpu" else 8192) / length)))
    if large < 2:
        return math.inf
    middle = [examples[i] for i in order[:large]]
    batches = [task.collate([some], pad_id, device) for some in (middle[:1], middle)]
    n_1, n_2 = length, large * max(map(len, middle))
    t_1, t_2 = _timed(batches, model, task)
    return (t_1 * n_2 - t_2 * n_1) / (t_2 - t_1) if t_2 > t_1 else math.inf


def _timed(batches: Sequence[Batch], model: Any, task: Task) -> list[float]:
    """Return for each batch the seconds of the fastest of a few passes, taken in turn."""
    times: list[list[float]] = [[] for _ in batches]
    while len(times[0]) < 2 or (len(times[0]) <= TRIES and sum(map(sum, times)) < LONG_S):
        for batch, found in zip(batches, times, strict=True):
            found.append(_seconds(batch, model, task))
    return [min(found[1:]) for found in times]


def _seconds(batch: Batch, model: Any, task: Task) -> float:
    began = time.perf_counter()
    losses_B = task.row_losses(model, batch)
    losses_B.sum().backward()
    if losses_B.device.type != "cpu":
        torch.get_device_module(losses_B.device).synchronize()
    return time.perf_counter() - began


def width(cost: float, train: TrainSpec, examples: Sequence[Example]) -> int:
    """Return how many trials should share a pass: so many that the overhead of each is a small share of its tokens."""
    some = itertools.islice(epochs(examples, train.batch_size, train.seed), LOOK_AT)
    rows = train.rows
    tokens = statistics.fmean(min(rows, len(batch)) * max(map(len, batch)) for batch in some)
    if not pays(cost, tokens):
        return 1
    return min(MOST, math.ceil(min(cost, 1e9) / (ENOUGH * tokens)))


def pays(cost: float, tokens: float) -> bool:
    """Tell whether a pass over so many tokens of a trial costs much by itself: sharing it then pays."""
    return cost >= LEAST * tokens


def passes(steps: Sequence[tuple[int, int]], cost: float, most: int) -> list[list[int]]:
    """Return which steps, given as (rows, length), share a pass so that the whole costs least: rows are padded to the
    longest of their pass, and each pass costs `cost` tokens by itself.
    """
    order = sorted(range(len(steps)), key=lambda i: steps[i][1])
    cost = min(max(cost, 0.0), 1e12)
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(order) + 1):
        length = steps[order[end - 1]][1]
        rows, options = 0, []
        for start in range(end - 1, max(-1, end - 1 - most), -1):
            rows += steps[order[start]][0]
            options.append((best[start][0] + cost + rows * length, start))
        best.append(min(options))
    out, end = [], len(order)
    while end:
        start = best[end][1]
        out.append(order[start:end])
        end = start
    return out[::-1]

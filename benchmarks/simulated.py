"""A study over recorded curves in virtual time: workers with slots, passes that share a base, pruning at reports.

Time is counted in optimiser steps of one trial that has the device to itself. A pass costs `overhead` by itself and 1
for each trial in it, scaled so that a trial alone costs 1 a step; evaluations cost nothing. Nothing here depends on a
clock.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from surrogate import Array, Curve

OVERHEAD = 1.0
"""What a pass costs by itself, in steps of a trial: eight slots are then 1.8 times as fast as one."""
LOOKS = 10
"""Evaluations of a run, besides those at a pruner's rungs."""


def pass_time(trials: int, slots: int, workers: int, steps: int, overhead: float = OVERHEAD) -> float:
    """Return the time on the wall of `steps` of each of the trials, spread over the workers' slots."""
    full, left = divmod(trials, slots * workers)
    last = min(slots, math.ceil(left / workers))
    passes = full * (overhead + slots) + (overhead + last if left else 0.0)
    return steps * passes / (overhead + 1)


class Curves(Protocol):
    """A data set: recorded (surrogate.py) or invented (landscapes.py)."""

    name: str
    total: int
    """Optimiser steps of a run."""

    def curve(self, setting: Mapping[str, Any], seed: Sequence[int]) -> Curve: ...

    def means(self, settings: Sequence[Mapping[str, Any]]) -> Array: ...


class Method(Protocol):
    """What is scored: a sampler with a pruner, asked as a study asks them."""

    eval_steps: frozenset[int]
    """Steps before the last after which it wants to see a trial, besides LOOKS."""

    def ask(self, running: int) -> tuple[int, Mapping[str, Any]] | None:
        """Return the next trial's number and setting; None where none may begin beside those that run now."""

    def report(self, number: int, step: int, value: float) -> None: ...

    def should_prune(self, number: int) -> bool: ...

    def tell(self, number: int, complete: bool, value: float) -> None: ...

    def best(self) -> int | None:
        """Return the trial that would be chosen now."""


@dataclass
class Run:
    number: int
    curve: Curve
    steps: list[int]
    """At which it is still to be evaluated, the last one is its end."""
    done: int = 0


@dataclass
class Worker:
    now: float = 0.0
    runs: list[Run] = field(default_factory=list)


@dataclass(frozen=True)
class Point:
    """The state of a study after an event."""

    time: float
    """Of the clock on the wall."""
    device: float
    """Time for which all devices together were held, idle or not."""
    test: float
    """The held-out metric of the trial that would be chosen."""
    ended: int


@dataclass
class Result:
    points: list[Point]
    settings: list[Mapping[str, Any]]
    states: list[str]
    """COMPLETE, PRUNED, or RUNNING where time was over."""

    def at_device(self, device: float) -> float | None:
        """Return the chosen trial's metric once so much device time was used; None before a trial has ended."""
        found = None
        for point in self.points:
            if point.device > device:
                break
            found = point.test
        return found

    def time_to(self, test: float) -> float:
        """Return the device time after which the chosen trial was as good as this for good; infinite for never."""
        found = float("inf")
        for point in reversed(self.points):
            if point.test < test:
                break
            found = point.device
        return found


class Simulation:
    """One study."""

    def __init__(
        self, curves: Curves, method: Method, *, slots: int, workers: int, seed: int, overhead: float = OVERHEAD
    ) -> None:
        self._curves = curves
        self._method = method
        self._slots = slots
        self._seed = seed
        self._overhead = overhead
        self._workers = [Worker() for _ in range(workers)]
        looks = {round(curves.total * k / LOOKS) for k in range(1, LOOKS)}
        inside = {s for s in method.eval_steps if s < curves.total}
        self._steps = [*sorted(looks | inside), curves.total]
        self._settings: dict[int, Mapping[str, Any]] = {}
        self._tests: dict[int, float] = {}
        self._states: dict[int, str] = {}
        self._points: list[Point] = []

    def run(self, until: float = float("inf")) -> Result:
        """Run the study until its method has no more trials, or until so much device time is used."""
        events = [(0.0, index) for index in range(len(self._workers))]
        idle: set[int] = set()
        while events:
            now, index = heapq.heappop(events)
            worker = self._workers[index]
            worker.now = now
            ended = self._look(worker)
            if self._held(now) < until:
                self._fill(worker)
            if worker.runs:
                heapq.heappush(events, (now + self._advance(worker), index))
            else:
                idle.add(index)
            if ended:  # what waits for results may go on
                for waiting in sorted(idle - {index}):
                    heapq.heappush(events, (now, waiting))
                idle &= {index}
        numbers = sorted(self._settings)
        return Result(
            self._points, [self._settings[n] for n in numbers], [self._states.get(n, "RUNNING") for n in numbers]
        )

    def _fill(self, worker: Worker) -> None:
        while len(worker.runs) < self._slots:
            asked = self._method.ask(sum(len(w.runs) for w in self._workers))
            if asked is None:
                return
            number, setting = asked
            self._settings[number] = setting
            curve = self._curves.curve(setting, (self._seed, number))
            self._tests[number] = curve.test
            worker.runs.append(Run(number, curve, list(self._steps)))

    def _advance(self, worker: Worker) -> float:
        """Take steps up to the next evaluation of any trial; return the time of them."""
        steps = min(run.steps[0] - run.done for run in worker.runs)
        for run in worker.runs:
            run.done += steps
        return pass_time(len(worker.runs), self._slots, 1, steps, self._overhead)

    def _held(self, now: float) -> float:
        return now * len(self._workers)

    def _look(self, worker: Worker) -> bool:
        """Report the trials that are due, then judge them; return whether one ended."""
        due = [run for run in worker.runs if run.steps[0] == run.done]
        for run in due:
            self._method.report(run.number, run.done, run.curve.at(run.done))
            run.steps.pop(0)
        gone = [run for run in due if not run.steps or self._method.should_prune(run.number)]
        for run in gone:
            self._method.tell(run.number, not run.steps, run.curve.at(run.done))
            self._states[run.number] = "PRUNED" if run.steps else "COMPLETE"
            worker.runs.remove(run)
        best = self._method.best() if gone else None
        if best is not None:
            self._points.append(Point(worker.now, self._held(worker.now), self._tests[best], len(self._states)))
        return bool(gone)

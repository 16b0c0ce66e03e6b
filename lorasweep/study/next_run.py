"""What to run next, which would tell most of what a study leaves open, and how long that takes."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from lorasweep.config.spec import SearchSpec
from lorasweep.study import repeats
from lorasweep.study.candidate import Candidate
from lorasweep.study.comparison import Rivals

GOOD_REPEATS = 3
"""Repeats of the best that a first look at seeds takes; three of three configurations are a good start."""


@dataclass(frozen=True)
class Next:
    """A command that goes on with a study."""

    what: str
    """What it does."""
    command: str
    runs: int
    """At most; it ends earlier where they would not change the choice."""
    seconds: float | None
    """For all of them; None where no trial says how long it took."""


def more_seeds(place: str, search: SearchSpec, best: Candidate, others: Sequence[Candidate], again: int) -> Next:
    """Return the command that runs the best configurations with new seeds; `again` repeats are there already.

    `others` are the complete ones beside the best, the nearest first.
    """
    members = [best, *others][: search.repeat_top]
    each = GOOD_REPEATS
    if again:
        there = math.ceil(again / len(members)) if search.repeats == repeats.AUTO else int(search.repeats)
        each = 2 * max(1, there)
    runs = max(0, each * len(members) - again)
    words = ["python", "-m", "lorasweep", "resume", place, f"search.repeats={each}"]
    return Next("the best again with new seeds", shlex.join(words), runs, _seconds(members, runs, search.workers))


def failed_again(place: str, search: SearchSpec, best: Candidate, count: int) -> Next:
    """Return the command that runs the failed trials again; they are taken to be as long as the best one."""
    command = shlex.join(["python", "-m", "lorasweep", "resume", place, "--failed"])
    return Next("the failed trials again", command, count, _seconds([best], count, search.workers))


def _seconds(members: Sequence[Candidate], runs: int, workers: int) -> float | None:
    known = [s for c in members if (s := c.result.device_s) is not None]
    return runs * sum(known) / len(known) / workers if known else None


def is_seeds(rivals: Rivals, first: int, second: int) -> bool:
    """Return whether seeds, not eval examples, make most of what is unsure about a difference."""
    return rivals.by_seeds and rivals.seed_variance(first, second) > rivals.error(first, second) ** 2 / 2

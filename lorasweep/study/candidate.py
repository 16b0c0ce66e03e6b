"""A complete configuration as the answer speaks of it, and what is nearly as good for less."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorasweep import console
from lorasweep.study import repeats
from lorasweep.study.direction import upward
from lorasweep.study.result import TrialResult
from lorasweep.study.significance import Interval

NOISE = {"train_s": 0.1, "peak_gib": 0.02}
"""Measured costs: shares by which two runs of the same work differ."""


@dataclass(frozen=True)
class Tested:
    """The metric of a trial's adapter on the test split, which chose nothing."""

    number: int
    value: float
    interval: Interval | None
    """95 %, over the test examples; None: the trial left no answers to them."""
    baseline: Mapping[str, float]
    """What trivial answers reach there, by name."""


@dataclass(frozen=True)
class Gap:
    """How much worse than the best a candidate is; positive: the best is better."""

    value: float
    interval: Interval
    """95 %, for all candidates together."""
    at_most: float
    """Upper end of the one-sided 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A complete configuration, with all its seeds."""

    result: TrialResult
    """Of its trial; of several seeds, of the first."""
    values: tuple[float, ...]
    """The primary metric of each run that is reported: of its repeats, or of all its runs where there are none."""
    value: float
    """Their mean."""
    searched: float
    """The primary metric of the search's own run."""
    repeated: bool
    """Whether it ran again with new seeds, which alone make `values`."""
    standard_error: float | None
    """Of `value`, over eval examples and seeds, as far as they are known; None: nothing tells."""
    interval: Interval | None
    """95 %, over the same."""
    scored: tuple[int, ...] = ()
    """The trials that make `values`."""
    gap: Gap | None = None
    """How much worse than the best, on the same examples; None: not compared."""
    alike: bool | None = None
    """Whether it may be as good as the best: it is in the model confidence set; None: not compared."""
    failed: tuple[int, ...] = ()
    """Repeats that did not end complete: it is not chosen."""

    @property
    def number(self) -> int:
        return self.result.number

    @property
    def costs(self) -> Mapping[str, float]:
        """By name, those that are known."""
        return self.result.costs

    @property
    def seeds(self) -> int:
        """With how many seeds it is reported."""
        return len(self.values)

    def is_comparable(self, other: "Candidate") -> bool:
        """Return whether both metrics are of the same eval rows; results that do not say are taken to be."""
        ours, theirs = self.result.eval_fingerprint, other.result.eval_fingerprint
        return ours == theirs or not ours or not theirs

    @property
    def point(self) -> Mapping[str, Any]:
        """The values of the keys that vary, the seed aside."""
        return {k: v for k, v in self.result.params_swept.items() if k != repeats.SEED_KEY}

    @property
    def label(self) -> str:
        point = ", ".join(f"{k}={console.short(v)}" for k, v in self.point.items())
        return f"trial {self.number}" + (f" ({point})" if point else "")


# --- what is nearly as good for less ---------------------------------------------------------------------------------


def cheapest(best: Candidate, candidates: Sequence[Candidate], margin: float) -> Candidate | None:
    """Return the candidate with fewest trainable parameters of those shown to be within the margin of the best.

    The best itself where no cheaper one is shown to be; None where costs are not known, or nothing was compared.
    """
    if "trainable" not in best.costs or all(c.gap is None for c in candidates):
        return None
    near = [c for c in candidates if c.gap is not None and c.gap.at_most < margin and "trainable" in c.costs]
    fewer = [c for c in near if c.costs["trainable"] < best.costs["trainable"] and not c.failed]
    return min([best, *fewer], key=lambda c: (c.costs["trainable"], c.gap.value if c.gap else 0.0, c.number))


def front(candidates: Sequence[Candidate], cost: str, maximize: bool) -> list[int]:
    """Return the candidates that no other one beats in metric and cost at once, cheapest first.

    Measured costs that differ by no more than their noise are equal.
    """
    noise = 1 + NOISE.get(cost, 0.0)
    priced = [c for c in in_order(candidates, maximize) if cost in c.costs]
    kept = [
        c
        for place, c in enumerate(priced)
        if all(other.costs[cost] > noise * c.costs[cost] for other in priced[:place])
    ]
    return [c.number for c in sorted(kept, key=lambda c: c.costs[cost])]


def in_order(candidates: Sequence[Candidate], maximize: bool) -> list[Candidate]:
    """Return candidates with the best metric first."""
    return sorted(candidates, key=lambda c: (-upward(c.value, maximize), c.number))

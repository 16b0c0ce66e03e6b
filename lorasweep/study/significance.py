"""How sure a metric is: the bootstrap over eval examples, and the spread over seeds.

Trials with the same examples are resampled alike, so that what makes an example hard for both cancels out.
Sources: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993; T. Hesterberg, What Teachers Should Know About
the Bootstrap, The American Statistician 69, 2015 (percentiles of a small sample are too narrow).

Shapes: R resamples, N examples, U units (examples, or groups where they belong together), K trials, C classes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from lorasweep.tasks.metric import Parts, all_combined, class_examples, exp_ratio, ratio

LEVEL = 0.95
RESAMPLES = 2000
MOST_UNITS = 5000
"""Examples that are drawn one by one; those of a larger split go into so many groups, at random, and groups are drawn:
the error comes out the same, in bounded memory.
"""
WEIGHTED = (ratio.__name__, exp_ratio.__name__)
"""Combinations in which an example weighs what stands in its second cell."""
FEWEST_FOR_PERCENTILES = 15
"""Equally heavy examples, or groups, below which resamples do not reach far enough out: Student's t is taken then."""
ONE_ALONE = 0.5
"""Degrees of freedom that a class with a single example counts for."""
SEED = 0
FEWEST_FREE = 2
"""Degrees of freedom below which the spread over seeds is not taken as known."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def within(self, low: float, high: float) -> "Interval":
        """Return the part between the ends of what a metric can be."""
        return Interval(max(low, self.low), min(high, self.high))

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


_REPLICATES: WeakKeyDictionary[Parts, np.ndarray] = WeakKeyDictionary()


def replicates(found: Parts) -> np.ndarray:
    """Return the metric on each resample, [R]; NaN where a resample has no value there."""
    if found not in _REPLICATES:
        resample([found])
    return _REPLICATES[found]


def resample(found: Iterable[Parts]) -> None:
    """Have the metric of many trials on each resample ready for `replicates`: together it is far less work."""
    fresh: dict[tuple[str, int, bytes], list[Parts]] = {}
    for parts in found:
        groups = b"" if parts.groups is None else np.asarray(parts.groups).tobytes()
        if parts not in _REPLICATES:
            fresh.setdefault((parts.kind, len(parts), groups), []).append(parts)
    for alike in fresh.values():
        unit_N, weights_RU = _resampled_units(alike[0])
        _REPLICATES.update(zip(alike, all_combined(alike, weights_RU, unit_N), strict=True))


def standard_error(*found: Parts) -> float:
    """Return the bootstrap standard error of the metric, of its mean over several runs on the same examples.

    Where all examples are right, or all wrong, no resample differs: then it is that of two more right and two more
    wrong ones. Source: A. Agresti, B. Coull, Approximate is better than "exact", 1998.
    """
    if _end(found) is not None:
        (low, high), count = found[0].bounds, units(found[0])
        return (high - low) * math.sqrt((count + 2) * 2 / (count + 4) ** 3)
    values_R = _finite(mean_replicates(found))
    return float(np.std(values_R, ddof=1)) * _widened(found[0]) if len(values_R) > 1 else math.nan


def interval(*found: Parts) -> Interval:
    """Return the 95 % interval of the metric, of its mean over several runs on the same examples.

    Wilson's for a share of right examples, for a mean from 0 to 1 over groups, and for any metric where all are right
    or all wrong; else by percentiles, which lie as far out as Student's t for so many examples.
    """
    end = _end(found)
    if end is not None:
        (low, high), share = found[0].bounds, wilson(end, units(found[0]))
        return Interval(low + (high - low) * share.low, low + (high - low) * share.high)
    if len(found) == 1 and found[0].groups is None and _is_right_or_wrong(found[0]):
        return wilson(found[0].value, units(found[0]))
    values_R = _finite(mean_replicates(found))
    if not len(values_R):
        return Interval(math.nan, math.nan)
    from scipy.special import ndtr, stdtrit

    far = float(stdtrit(max(independent(found[0]) - 1, 1), (1 + LEVEL) / 2))
    if found[0].kind == ratio.__name__ and found[0].bounds == (0.0, 1.0) and found[0].groups is not None:
        return wilson(float(np.mean([f.value for f in found])), _effective(found), far)
    far *= _widened(found[0])
    if independent(found[0]) < FEWEST_FOR_PERCENTILES:
        value, half = float(np.mean([f.value for f in found])), far * float(np.std(values_R, ddof=1))
        return Interval(value - half, value + half).within(*found[0].bounds)
    low, high = np.quantile(values_R, [ndtr(-far), ndtr(far)])
    return Interval(float(low), float(high))


def independent(found: Parts) -> float:
    """Return how many independent examples of equal weight would tell as much as these.

    In a ratio (a loss a token) a few long documents may carry most of it, in a macro average the examples of rare
    classes. Source: L. Kish, Survey Sampling, 1965.
    """
    units_C = _class_units(found)
    if units_C is not None:
        return float(len(units_C) ** 2 / (1 / units_C).sum())
    if found.kind not in WEIGHTED:
        return float(units(found))
    weight_U = np.asarray(found.second, float)
    if found.groups is not None:
        weight_U = np.bincount(np.unique(found.groups, return_inverse=True)[1], weight_U)
    squares = float((weight_U**2).sum())
    return float(weight_U.sum()) ** 2 / squares if squares > 0 else float(units(found))


def _widened(found: Parts) -> float:
    """Return by how much resamples are too near to each other: each draws from one example less than there are.

    In a macro average that holds in each class. One with a single example shows nothing of its own spread; it counts
    for half of what one with two shows.
    """
    units_C = _class_units(found)
    if units_C is not None:
        return math.sqrt((1 / units_C).sum() / (np.maximum(units_C - 1, ONE_ALONE) / units_C**2).sum())
    count = independent(found)
    return math.sqrt(count / (count - 1)) if count > 1 else 1.0


def _class_units(found: Parts) -> np.ndarray | None:
    """Return how many independent examples the part of each class in a macro average rests on; None without classes."""
    by_class_NC = class_examples(found)
    if by_class_NC is None:
        return None
    units_N = np.arange(len(found)) if found.groups is None else np.asarray(found.groups)
    counts = [len(np.unique(units_N[marked_N])) for marked_N in by_class_NC.T]
    units_C = np.array([count for count in counts if count], float)
    return units_C if len(units_C) else None


def wilson(share: float, count: float, far: float | None = None) -> Interval:
    """Return the 95 % interval of a share of `count` independent examples, `far` standard errors to each side.

    Source: E. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    from scipy.special import ndtri

    z = float(ndtri((1 + LEVEL) / 2)) if far is None else far
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(centre - half, centre + half)


def _effective(found: Sequence[Parts]) -> float:
    """Return how many right or wrong examples, each standing alone, would give the mean over groups this error.

    Right or wrong ones in groups tell no more than alone; scores between may. Source: E. Korn, B. Graubard, Confidence
    Intervals for Proportions with Small Expected Number of Positive Counts Estimated from Survey Data, 1998.
    """
    share, error, count = float(np.mean([f.value for f in found])), standard_error(*found), len(found[0])
    effective = share * (1 - share) / error**2 if error else math.inf
    return min(effective, count) if math.isinf(effective) or _is_right_or_wrong(found[0]) else effective


def _end(found: Sequence[Parts]) -> float | None:
    """Return 1 where the metric is as high as it can be, 0 where it is as low, None between and where it has no end.

    All examples are right then, or all wrong, and so they are in every resample.
    """
    low, high = found[0].bounds
    if not math.isfinite(high - low):
        return None
    values = {f.value for f in found}
    return next((end for end, bound in ((0.0, low), (1.0, high)) if values == {bound}), None)


def _is_right_or_wrong(found: Parts) -> bool:
    """Return whether the metric is the share of right ones among the examples."""
    if found.kind != ratio.__name__ or found.bounds != (0.0, 1.0):
        return False
    first, second = np.asarray(found.first, float), np.asarray(found.second, float)
    return bool((second == 1).all() and np.isin(first, (0.0, 1.0)).all())


def examples(found: Parts) -> bytes:
    """Return which examples of the eval split were scored; two trials' metrics compare only where it is equal."""
    return np.asarray(found.rows, np.int64).tobytes()


def units(found: Parts) -> int:
    """Return how many independent examples were scored: groups, where examples belong together."""
    return len(found) if found.groups is None else len(np.unique(found.groups))


def mean_replicates(found: Sequence[Parts]) -> np.ndarray:
    """Return the mean over several runs of the metric on each resample, [R]."""
    return np.mean(np.stack([replicates(s) for s in found]), axis=0)


def without_choice(found: Sequence[Parts], maximize: bool) -> float:
    """Return the metric of the best of several trials without the luck of its choice on these examples.

    On each resample the best is chosen, and scored on the examples that the resample left out.
    Source: I. Tsamardinos, E. Greasidou, G. Borboudakis, Bootstrapping the Out-of-sample Predictions for Efficient and
    Accurate Cross-Validation, 2018.
    """
    unit_N, weights_RU = _resampled_units(found[0])
    left_out_KR = all_combined(found, (weights_RU == 0).astype(float), unit_N)
    resample(found)
    chosen_on_KR = np.stack([replicates(s) for s in found])
    worst = -np.inf if maximize else np.inf
    ranked_KR = np.where(np.isfinite(chosen_on_KR), chosen_on_KR, worst)
    chosen_R = ranked_KR.argmax(0) if maximize else ranked_KR.argmin(0)
    return float(np.mean(_finite(left_out_KR[chosen_R, np.arange(len(chosen_R))])))


def sure(
    found: Sequence[Parts], values: Sequence[float], spread: "Spread | None"
) -> tuple[float | None, Interval | None]:
    """Return the standard error and the 95 % interval of the mean of a configuration's runs.

    Over the examples, and over seeds where their spread is known: the variances add up. (None, None): nothing tells.
    """
    if spread is None:
        return (standard_error(*found), interval(*found)) if found else (None, None)
    from scipy.special import stdtrit

    by_examples = standard_error(*found) if found else 0.0
    by_seeds = spread.of_mean(len(values))
    error = math.hypot(by_examples, by_seeds)
    free = spread.free * (error / by_seeds) ** 4 if by_seeds else math.inf  # Satterthwaite's
    half = float(stdtrit(min(free, 1e6), (1 + LEVEL) / 2)) * error
    value = float(np.mean(values))
    return error, Interval(value - half, value + half)


@dataclass(frozen=True)
class Spread:
    """How far runs of one configuration lie apart that differ by their seed."""

    error: float
    """Standard deviation of one run."""
    free: float
    """Degrees of freedom."""

    def of_mean(self, count: int) -> float:
        """Return the standard error of the mean of `count` runs."""
        return self.error / math.sqrt(count)


def spread(runs: Iterable[Mapping[int, float]]) -> Spread | None:
    """Return the spread over seeds, taken as one for all configurations; None where too few ran with several seeds.

    `runs` are seed -> metric of each configuration. What a seed does to all alike is seen once a seed, however many
    configurations run with it: there are no more degrees of freedom than that.
    """
    several = [found for found in runs if len(found) > 1]
    free = sum(len(found) - 1 for found in several)
    if free < FEWEST_FREE:
        return None
    variance = sum(float(np.var(list(found.values()))) * len(found) for found in several) / free
    seeds = {seed for found in several for seed in found}
    return Spread(math.sqrt(variance), min(free, len(seeds) - 1))


# --- resamples -------------------------------------------------------------------------------------------------------


def _resampled_units(found: Parts) -> tuple[np.ndarray | None, np.ndarray]:
    """Return which unit each example is in, [N], None where each is one, and how often resamples have units, [R, U].

    A unit is what belongs together, or of a large split a random group of that.
    """
    unit_N, count = None, len(found)
    if found.groups is not None:
        names, unit_N = np.unique(found.groups, return_inverse=True)
        count = len(names)
    if count > MOST_UNITS:
        random_U = np.random.default_rng([SEED, count]).permutation(count) % MOST_UNITS
        unit_N, count = random_U if unit_N is None else random_U[unit_N], MOST_UNITS
    return unit_N, _weights(count).astype(float)


@lru_cache(maxsize=4)
def _weights(count: int) -> np.ndarray:
    """Return how often each resample has each unit, [R, U]; the same for every trial."""
    rng = np.random.default_rng([SEED, count])
    out_RU = np.empty((RESAMPLES, count), np.uint8)
    for row_U in out_RU:
        row_U[:] = np.bincount(rng.integers(0, count, count), minlength=count)
    return out_RU


def _finite(values_R: np.ndarray) -> np.ndarray:
    return values_R[np.isfinite(values_R)]

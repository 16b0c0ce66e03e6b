"""How sure a metric is: the bootstrap over eval examples, of one trial and of the difference of two, and over seeds.

Trials with the same examples are resampled alike, so that what makes an example hard for both cancels out.
Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993.

Shapes: R resamples, N examples, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lorasweep import scores
from lorasweep.scores import Scores

LEVEL = 0.95
RESAMPLES, FEWEST_RESAMPLES = 1000, 200
MOST_DRAWS = 10_000_000
"""Draws in all; a larger split has fewer resamples, down to FEWEST_RESAMPLES."""
SEED = 0
FEWEST_FREE = 2
"""Degrees of freedom below which the spread over seeds is not taken as known."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:.4f} to {self.high:.4f}"


@dataclass(frozen=True)
class Difference:
    """Of two trials' metrics on the same examples."""

    value: float
    interval: Interval

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval.low > 0 or self.interval.high < 0


def metric(found: Scores) -> float:
    """Return the metric on all examples."""
    return float(_metrics(found, np.ones((1, len(found))))[0])


@lru_cache(maxsize=1024)
def replicates(found: Scores) -> np.ndarray:
    """Return the metric on each resample, [R]; NaN where a resample has nothing to score."""
    return _metrics(found, _weights(len(found)))


def standard_error(found: Scores) -> float:
    """Return the bootstrap standard error of the metric."""
    values_R = _finite(replicates(found))
    return float(np.std(values_R, ddof=1)) if len(values_R) > 1 else math.nan


def interval(found: Scores) -> Interval:
    """Return the metric's 95 % interval, by percentiles."""
    return _percentiles(replicates(found))


def paired(first: Sequence[Scores], second: Sequence[Scores]) -> Difference | None:
    """Return first minus second, each as the mean over its trials; None where their examples are not the same."""
    parts = [*first, *second]
    if not first or not second or any(_examples(p) != _examples(parts[0]) for p in parts):
        return None
    apart = _mean([replicates(s) for s in first]) - _mean([replicates(s) for s in second])
    value = float(np.mean([metric(s) for s in first]) - np.mean([metric(s) for s in second]))
    return Difference(value, _percentiles(apart))


def over_seeds(values: Sequence[float]) -> Interval | None:
    """Return the t-interval of the mean of a configuration's runs; None for a single one."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + LEVEL) / 2, len(values) - 1)) * seed_error(values)
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def seed_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of two runs or more."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def apart(first: Sequence[float], second: Sequence[float], beside: Sequence[Sequence[float]]) -> Interval | None:
    """Return the t-interval of the difference of two configurations' means; None where too few seeds were repeated.

    The spread over seeds is taken as one, learned from all the configurations `beside`, these two among them.
    """
    free = sum(len(v) - 1 for v in beside)
    if free < FEWEST_FREE:
        return None
    from scipy.stats import t

    pooled = math.sqrt(sum(float(np.var(v)) * len(v) for v in beside) / free)
    half = float(t.ppf((1 + LEVEL) / 2, free)) * pooled * math.sqrt(1 / len(first) + 1 / len(second))
    value = float(np.mean(first) - np.mean(second))
    return Interval(value - half, value + half)


# --- resamples -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _weights(count: int) -> np.ndarray:
    """Return how often each resample has each of so many examples, [R, N]: the same for every trial."""
    rng = np.random.default_rng([SEED, count])
    resamples = max(FEWEST_RESAMPLES, min(RESAMPLES, MOST_DRAWS // count))
    out_RN = np.empty((resamples, count))
    for row_N in out_RN:
        row_N[:] = np.bincount(rng.integers(0, count, count), minlength=count)
    return out_RN


def _metrics(found: Scores, weights_RN: np.ndarray) -> np.ndarray:
    """Return the metric under each row of weights, [R]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        match found.kind:
            case scores.RATIO | scores.EXP_RATIO:
                both_N2 = np.stack([np.asarray(found.first, float), np.asarray(found.second, float)], axis=1)
                sums_R2 = weights_RN @ both_N2
                ratio_R = sums_R2[:, 0] / sums_R2[:, 1]
                return np.exp(np.minimum(ratio_R, 700)) if found.kind == scores.EXP_RATIO else ratio_R
            case scores.PEARSON:
                return _pearson(np.asarray(found.first, float), np.asarray(found.second, float), weights_RN)
            case scores.SPEARMAN:
                return _spearman(np.asarray(found.first, float), np.asarray(found.second, float), weights_RN)
        return _over_classes(found, weights_RN)


def _pearson(first_N: np.ndarray, second_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    x_N, y_N = first_N - first_N.mean(), second_N - second_N.mean()
    columns_N5 = np.stack([x_N, y_N, x_N * y_N, x_N**2, y_N**2], axis=1)
    means_R5 = weights_RN @ columns_N5 / weights_RN.sum(1)[:, None]
    x, y, xy, xx, yy = means_R5.T
    return (xy - x * y) / np.sqrt((xx - x**2) * (yy - y**2))


def _spearman(first_N: np.ndarray, second_N: np.ndarray, weights_RN: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    out = []
    for weights_N in weights_RN:
        at = np.repeat(np.arange(len(first_N)), weights_N.astype(int))
        ranks = rankdata(first_N[at]), rankdata(second_N[at])
        out.append(_pearson(*ranks, np.ones((1, len(at))))[0])
    return np.array(out)


def _over_classes(found: Scores, weights_RN: np.ndarray) -> np.ndarray:
    """Return an average over the classes that occur, or Matthews' correlation, from counts of each class, [R]."""
    lengths = [len(cell) for cell in found.first]
    owner = np.repeat(np.arange(len(found)), lengths)
    ours, theirs = (np.concatenate([np.asarray(c, int) for c in side]) for side in (found.first, found.second))
    classes = max(ours.max(), theirs.max()) + 1
    counts_3NC = np.zeros((3, len(found), classes))
    for table_NC, marked, cells in zip(
        counts_3NC, (ours == theirs, ours >= 0, theirs >= 0), (ours, ours, theirs), strict=True
    ):
        kept = marked & (cells >= 0)
        np.add.at(table_NC, (owner[kept], cells[kept]), 1)
    right_RC, found_RC, there_RC = weights_RN @ counts_3NC
    if found.kind == "mcc":
        total_R = found_RC.sum(1)
        apart_R = right_RC.sum(1) * total_R - (found_RC * there_RC).sum(1)
        spread_R = (total_R**2 - (found_RC**2).sum(1)) * (total_R**2 - (there_RC**2).sum(1))
        return np.where(spread_R > 0, apart_R / np.sqrt(spread_R), 0.0)
    part, whole = {
        "macro_f1": (2 * right_RC, found_RC + there_RC),
        "macro_precision": (right_RC, found_RC),
        "macro_recall": (right_RC, there_RC),
    }[found.kind]
    occurs_RC = found_RC + there_RC > 0
    return (np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0) * occurs_RC).sum(1) / occurs_RC.sum(1)


def _percentiles(values_R: np.ndarray) -> Interval:
    known_R = _finite(values_R)
    if not len(known_R):
        return Interval(math.nan, math.nan)
    low, high = np.percentile(known_R, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(float(low), float(high))


def _finite(values_R: np.ndarray) -> np.ndarray:
    return values_R[np.isfinite(values_R)]


def _mean(replicates_R: Sequence[np.ndarray]) -> np.ndarray:
    return np.mean(np.stack(replicates_R), axis=0)


def _examples(found: Scores) -> bytes:
    return np.asarray(found.rows, np.int64).tobytes()

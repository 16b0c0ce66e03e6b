"""How sure a metric is: the bootstrap over eval examples, of one trial and of the difference of two; over seeds; Holm.

Trials with the same examples are resampled alike, so that what makes an example hard for both cancels out.
Source: B. Efron, R. Tibshirani, An Introduction to the Bootstrap, 1993.

Shapes: R resamples, N examples, C classes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from lorasweep.study import example_scores
from lorasweep.study.example_scores import Scores

LEVEL = 0.95
RESAMPLES, FEWEST_RESAMPLES = 1000, 200
MOST_DRAWS = 10_000_000
"""Draws in all; a larger split has fewer resamples, down to FEWEST_RESAMPLES."""
SEED = 0
UNBOUNDED = ("loss", "mse")
"""Metrics whose 0 or 1 means nothing of the kind."""
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


@dataclass(frozen=True)
class Difference:
    """Of two configurations' metrics."""

    value: float
    interval: Interval
    p: float
    """Two-sided: how often chance alone makes a difference as large."""

    @property
    def distinguishable(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.interval.low > 0 or self.interval.high < 0


def limits(metric: str) -> tuple[float, float]:
    """Return the lowest and the highest value that a metric can have."""
    if metric in (*UNBOUNDED, "perplexity"):
        return 0.0, math.inf
    return (-1.0, 1.0) if metric in (example_scores.PEARSON, example_scores.SPEARMAN, "mcc") else (0.0, 1.0)


def metric(found: Scores) -> float:
    """Return the metric on all examples."""
    return float(_metrics(found, np.ones((1, len(found))))[0])


@lru_cache(maxsize=1024)
def replicates(found: Scores) -> np.ndarray:
    """Return the metric on each resample, [R]; NaN where a resample has nothing to score."""
    return _metrics(found, _weights(len(found)))


def standard_error(*found: Scores) -> float:
    """Return the bootstrap standard error of the metric, of its mean over several runs on the same examples.

    Where all examples are right, or all wrong, no resample differs: then it is that of two more right and two more
    wrong ones. Source: A. Agresti, B. Coull, Approximate is better than "exact", 1998.
    """
    if _one_sided(found) is not None:
        count = len(found[0])
        return math.sqrt((count + 2) * 2 / (count + 4) ** 3)
    values_R = _finite(_mean([replicates(s) for s in found]))
    return float(np.std(values_R, ddof=1)) if len(values_R) > 1 else math.nan


def interval(*found: Scores) -> Interval:
    """Return the 95 % interval of the metric, of its mean over several runs on the same examples, by percentiles.

    Where all examples are right, or all wrong, it is the exact binomial one.
    """
    side = _one_sided(found)
    if side is not None:
        far = ((1 - LEVEL) / 2) ** (1 / len(found[0]))
        return Interval(far, 1.0) if side else Interval(0.0, 1 - far)
    return _percentiles(_mean([replicates(s) for s in found]))


def _one_sided(found: Sequence[Scores]) -> bool | None:
    """Return whether a share of right examples is that of all of them or of none, None where it is neither."""
    if any(f.kind != example_scores.RATIO or f.metric in UNBOUNDED for f in found):
        return None
    first, second = (np.concatenate([np.asarray(getattr(f, n), float) for f in found]) for n in ("first", "second"))
    marks = set(np.unique(first))
    return bool(marks.pop()) if marks in ({0.0}, {1.0}) and (second == 1).all() else None


def paired(first: Sequence[Scores], second: Sequence[Scores]) -> Difference | None:
    """Return first minus second, each as the mean over its trials; None where their examples are not the same."""
    parts = [*first, *second]
    if not first or not second or any(_examples(p) != _examples(parts[0]) for p in parts):
        return None
    apart = _mean([replicates(s) for s in first]) - _mean([replicates(s) for s in second])
    value = float(np.mean([metric(s) for s in first]) - np.mean([metric(s) for s in second]))
    error = float(np.std(_finite(apart), ddof=1)) if len(_finite(apart)) > 1 else math.nan
    return Difference(value, _percentiles(apart), _chance(value, error, None))


def holm(chances: Sequence[float]) -> list[bool]:
    """Return which of several comparisons count as differences, so that all of them together err in 5 % of cases.

    Source: S. Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    out, going = [False] * len(chances), True
    for left, i in zip(range(len(chances), 0, -1), sorted(range(len(chances)), key=chances.__getitem__), strict=True):
        going = going and chances[i] * left <= 1 - LEVEL
        out[i] = going
    return out


def _chance(value: float, error: float, free: int | None) -> float:
    """Return the two-sided p-value of a difference with a standard error: normal, or Student's with `free` degrees."""
    if not error > 0:  # nothing varies, or nothing is known
        return 0.0 if value and error == 0 else 1.0
    from scipy.stats import norm, t

    return float(2 * (norm.sf(abs(value) / error) if free is None else t.sf(abs(value) / error, free)))


@dataclass(frozen=True)
class Spread:
    """How far runs of one configuration lie apart that differ by their seed."""

    error: float
    """Standard deviation of one run."""
    free: int
    """Degrees of freedom."""

    def of_mean(self, count: int) -> float:
        """Return the standard error of the mean of so many runs."""
        return self.error / math.sqrt(count)

    def around(self, values: Sequence[float]) -> Interval:
        """Return the t-interval of the mean of a configuration's runs."""
        return self._interval(float(np.mean(values)), self.of_mean(len(values)))

    def apart(self, first: Sequence[float], second: Sequence[float]) -> Difference:
        """Return the difference of two configurations' means."""
        error = self.error * math.sqrt(1 / len(first) + 1 / len(second))
        value = float(np.mean(first) - np.mean(second))
        return Difference(value, self._interval(value, error), _chance(value, error, self.free))

    def _interval(self, value: float, error: float) -> Interval:
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, self.free)) * error
        return Interval(value - half, value + half)


def spread(runs: Iterable[Sequence[float]]) -> Spread | None:
    """Return the spread over seeds, taken as one for all configurations; None where too few ran with several seeds."""
    several = [r for r in runs if len(r) > 1]
    free = sum(len(r) - 1 for r in several)
    if free < FEWEST_FREE:
        return None
    return Spread(math.sqrt(sum(float(np.var(r)) * len(r) for r in several) / free), free)


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
            case example_scores.RATIO | example_scores.EXP_RATIO:
                both_N2 = np.stack([np.asarray(found.first, float), np.asarray(found.second, float)], axis=1)
                sums_R2 = weights_RN @ both_N2
                ratio_R = sums_R2[:, 0] / sums_R2[:, 1]
                return np.exp(np.minimum(ratio_R, 700)) if found.kind == example_scores.EXP_RATIO else ratio_R
            case example_scores.PEARSON:
                return _pearson(np.asarray(found.first, float), np.asarray(found.second, float), weights_RN)
            case example_scores.SPEARMAN:
                return _spearman(np.asarray(found.first, float), np.asarray(found.second, float), weights_RN)
            case "bleu" | "chrf":
                counts_NC = np.hstack([np.asarray(found.first, float), np.asarray(found.second, float)])
                return (_bleu if found.kind == "bleu" else _chrf)(weights_RN @ counts_NC)
        return _over_classes(found, weights_RN)


def _bleu(counts_RC: np.ndarray) -> np.ndarray:
    """Return BLEU without smoothing from sums of `generation.counts`, [R]."""
    matched_R4, there_R4, ours_R, theirs_R = counts_RC[:, :4], counts_RC[:, 4:8], counts_RC[:, 8], counts_RC[:, 9]
    geometric_R = np.exp(np.log(matched_R4 / there_R4).mean(1))
    brevity_R = np.where(ours_R > theirs_R, 1.0, np.exp(1 - theirs_R / ours_R))
    return np.where(matched_R4.min(1) > 0, brevity_R * geometric_R, 0.0)


def _chrf(counts_RC: np.ndarray) -> np.ndarray:
    """Return chrF (beta 2) from sums of `generation.counts`, [R]."""
    matched_R6, ours_R6, theirs_R6 = np.split(counts_RC, 3, axis=1)
    precision_R6, recall_R6 = (np.where(n > 0, matched_R6 / np.where(n > 0, n, 1), 0.0) for n in (ours_R6, theirs_R6))
    return (5 * precision_R6 * recall_R6 / np.maximum(4 * precision_R6 + recall_R6, 1e-16)).mean(1)


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

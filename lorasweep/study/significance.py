"""How sure a metric is: the bootstrap over eval examples, and the spread over seeds.

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
    if _share(found) in (0.0, 1.0):
        count = len(found[0])
        return math.sqrt((count + 2) * 2 / (count + 4) ** 3)
    values_R = _finite(mean_replicates(found))
    return float(np.std(values_R, ddof=1)) if len(values_R) > 1 else math.nan


def interval(*found: Scores) -> Interval:
    """Return the 95 % interval of the metric, of its mean over several runs on the same examples.

    Wilson's for a share of right examples (of several runs: where all are right or all wrong), else by percentiles.
    """
    share = _share(found)
    if share is not None and (len(found) == 1 or share in (0.0, 1.0)):
        return wilson(share, units(found[0]))
    return _percentiles(mean_replicates(found))


def wilson(share: float, count: int) -> Interval:
    """Return the 95 % interval of a share of `count` independent examples.

    Source: E. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    from scipy.stats import norm

    z = float(norm.ppf((1 + LEVEL) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return Interval(centre - half, centre + half)


def _share(found: Sequence[Scores]) -> float | None:
    """Return the share of right examples where that is the metric, None where it is another one."""
    if any(f.kind != example_scores.RATIO or f.metric in UNBOUNDED for f in found):
        return None
    first, second = (np.concatenate([np.asarray(getattr(f, n), float) for f in found]) for n in ("first", "second"))
    if not (second == 1).all() or not np.isin(first, (0.0, 1.0)).all():
        return None
    return float(first.mean())


def examples(found: Scores) -> bytes:
    """Return which examples of the eval split were scored; two trials' metrics compare only where it is equal."""
    return np.asarray(found.rows, np.int64).tobytes()


def units(found: Scores) -> int:
    """Return how many independent examples were scored."""
    return len(found)


def mean_replicates(found: Sequence[Scores]) -> np.ndarray:
    """Return the mean over several runs of the metric on each resample, [R]."""
    return np.mean(np.stack([replicates(s) for s in found]), axis=0)


def without_choice(found: Sequence[Scores], maximize: bool) -> float:
    """Return the metric of the best of several trials without the luck of its choice on these examples.

    On each resample the best is chosen, and scored on the examples that the resample left out.
    Source: I. Tsamardinos, E. Greasidou, G. Borboudakis, Bootstrapping the Out-of-sample Predictions for Efficient and
    Accurate Cross-Validation, 2018.
    """
    weights_RN = _weights(len(found[0]))
    chosen_on_KR = np.stack([replicates(s) for s in found])
    left_out_KR = np.stack([_metrics(s, (weights_RN == 0).astype(float)) for s in found])
    worst = -np.inf if maximize else np.inf
    ranked_KR = np.where(np.isfinite(chosen_on_KR), chosen_on_KR, worst)
    chosen_R = ranked_KR.argmax(0) if maximize else ranked_KR.argmin(0)
    return float(np.mean(_finite(left_out_KR[chosen_R, np.arange(len(weights_RN))])))


def sure(
    found: Sequence[Scores], values: Sequence[float], spread: "Spread | None"
) -> tuple[float | None, Interval | None]:
    """Return the standard error and the 95 % interval of the mean of a configuration's runs.

    Over the examples, and over seeds where their spread is known: the variances add up. (None, None): nothing tells.
    """
    if spread is None:
        return (standard_error(*found), interval(*found)) if found else (None, None)
    from scipy.stats import t

    by_examples = standard_error(*found) if found else 0.0
    by_seeds = spread.of_mean(len(values))
    error = math.hypot(by_examples, by_seeds)
    free = spread.free * (error / by_seeds) ** 4 if by_seeds else math.inf  # Satterthwaite's
    half = float(t.ppf((1 + LEVEL) / 2, min(free, 1e6))) * error
    value = float(np.mean(values))
    return error, Interval(value - half, value + half)


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

"""What all runs of a study say of each configuration, and which one more run would help most to choose.

Sources: P. Frazier, W. Powell, S. Dayanik, The Knowledge-Gradient Policy for Correlated Normal Beliefs, 2009 (here
independent ones); B. Efron, C. Morris, Stein's Paradox in Statistics, 1977 (means pulled towards what is usual);
S. Gupta, K. Miescke, Bayesian look ahead one-stage sampling allocations for selection of the best population, 1996.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.study.comparison import LEVEL, Rivals, fit_seeds, quantile, worst_loss
from lorasweep.study.direction import upward

SMALLEST_PRIOR_SHARE = 0.05
"""The prior's variance is at least this share of the variance between the means: else the first runs decide all."""
PRIOR_FREE = 1
"""Degrees of freedom that the first guess of the seed error weighs: two or three runs estimate it badly."""
STEPS = 400
"""Of the integral over the best configuration's true metric."""


@dataclass(frozen=True)
class Belief:
    """The true metric of each configuration as a normal distribution; larger is better."""

    mean: Mapping[int, float]
    variance: Mapping[int, float]
    run_variance: float
    """Of one run around its configuration's true metric."""
    pulled: Mapping[int, float]
    """By how much each expected metric is below the mean of its runs: what of that mean is taken for luck."""

    @property
    def best(self) -> int:
        """Return the configuration with the highest expected metric; of equals, the first."""
        return max(self.mean, key=lambda k: (self.mean[k], -k))

    def gain(self, name: int) -> float:
        """Return by how much one more run of a configuration is expected to better the choice."""
        from scipy.special import ndtr

        others = [m for k, m in self.mean.items() if k != name]
        variance = self.variance[name]
        step = math.sqrt(max(variance - 1 / (1 / variance + 1 / self.run_variance), 0.0)) if variance > 0 else 0.0
        if not others or step == 0:
            return 0.0
        z = -abs(self.mean[name] - max(others)) / step
        return float(step * (z * ndtr(z) + math.exp(-z * z / 2) / math.sqrt(2 * math.pi)))

    def left_open(self) -> float:
        """Return by how much the choice would be expected to better if the true metrics were known: no number of runs
        gains more.
        """
        from scipy.special import log_ndtr

        mean_K, sd_K = np.array(list(self.mean.values())), np.sqrt(list(self.variance.values()))
        steps_S = np.linspace(mean_K.max() - 5 * sd_K.max(), (mean_K + 6 * sd_K).max(), STEPS)
        below_S = np.exp(log_ndtr((steps_S[:, None] - mean_K) / sd_K).sum(1))  # chance that all are below each step
        return max(0.0, float(steps_S[0] + np.trapezoid(1 - below_S, steps_S) - mean_K.max()))


def belief(runs: Mapping[int, Mapping[int, float]], maximize: bool) -> Belief:
    """Return what runs, configuration -> seed -> metric, say; the search's own runs count like all others.

    The prior is as wide as the better half lies around the median: a long tail of bad configurations says nothing of
    how far the good ones are apart. Half of that variance is the first guess of a run's, which two degrees of freedom
    outweigh.
    """
    signed = {k: {seed: upward(value, maximize) for seed, value in found.items()} for k, found in runs.items()}
    fit = fit_seeds(signed)
    if fit is not None:
        means = dict(zip(runs, map(float, fit.mean_K), strict=True))
    else:
        means = {k: statistics.fmean(found.values()) for k, found in signed.items()}
    centre = statistics.median(means.values())
    between = statistics.fmean((m - centre) ** 2 for m in means.values() if m >= centre)
    smallest = max(between, 1e-12) * 1e-6
    known, free = (fit.variance, fit.free) if fit is not None else (0.0, 0)
    run_variance = max((free * known + PRIOR_FREE * between / 2) / (free + PRIOR_FREE), smallest)
    counts = {k: len(found) for k, found in runs.items()}
    chance = statistics.fmean(run_variance / n for n in counts.values())
    prior = max(between - chance, SMALLEST_PRIOR_SHARE * between, smallest)
    variance = {k: 1 / (1 / prior + n / run_variance) for k, n in counts.items()}
    expected = {k: variance[k] * (centre / prior + counts[k] * means[k] / run_variance) for k in means}
    return Belief(expected, variance, run_variance, {k: means[k] - expected[k] for k in means})


@dataclass(frozen=True)
class Doubt:
    """What seeds leave open about a choice: one-sided 95 %, for each configuration by itself."""

    number: int
    """The configuration that may be better than the chosen one by most; the chosen one where it is alone."""
    at_most: float
    """By how much; where it is alone, by how much its mean may be off."""


def doubt(runs: Mapping[int, Mapping[int, float]], chosen: int, maximize: bool) -> Doubt | None:
    """Return how much better than the chosen configuration another one may be, as far as seeds tell.

    `runs` are those of configurations with several seeds. None before seeds tell anything.
    """
    if chosen not in runs or len(runs[chosen]) < 2:
        return None
    if len(runs) == 1:
        values = list(runs[chosen].values())
        error = statistics.stdev(values) / math.sqrt(len(values))
        return Doubt(chosen, quantile(LEVEL, len(values) - 1) * error)
    fit = fit_seeds(runs)
    if fit is None:
        return None
    place, no_examples_KR = fit.names.index(chosen), np.zeros((len(runs), 2))
    rivals = Rivals(upward(fit.mean_K, maximize), no_examples_KR, fit.covariance_KK, fit.free)
    ahead = {n: worst_loss(rivals, k, place) for k, n in enumerate(fit.names) if k != place}
    number = max(ahead, key=lambda n: (ahead[n], -n))
    return Doubt(number, max(ahead[number], 0.0))


def expected_gain(values: Sequence[float], more: int) -> float:
    """Return by how much the best of `more` further draws is expected to beat the best of `values`; larger is better.

    Draws like those that are known: Student's t with their mean and spread, which a sampler that learns betters and a
    search that is nearly done does not.
    """
    from scipy.stats import t

    best, spread = max(values), statistics.stdev(values)
    if spread == 0:
        return 0.0
    predictive = t(len(values) - 1, statistics.fmean(values), spread * math.sqrt(1 + 1 / len(values)))
    steps_S = np.linspace(best, best + 10 * spread, 2001)
    beyond_S = -np.expm1(more * predictive.logcdf(steps_S))  # chance that the best of them is beyond each step
    return float(np.trapezoid(beyond_S, steps_S))


def near_enough(given: float | None, bounds: tuple[float, float], value: float) -> float:
    """Return how much worse than the best counts as near enough: search.margin, or a point, or 1 % of a loss."""
    if given is not None:
        return given
    return 0.01 if math.isfinite(bounds[1]) else 0.01 * abs(value)

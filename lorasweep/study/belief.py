"""What all runs of a study say of each configuration, and which one more run would help most to choose.

Sources: P. Frazier, W. Powell, S. Dayanik, The Knowledge-Gradient Policy for Correlated Normal Beliefs, 2009 (here
independent ones); B. Efron, C. Morris, Stein's Paradox in Statistics, 1977 (means pulled towards what is usual).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lorasweep.study.comparison import fit_seeds
from lorasweep.study.direction import upward

SMALLEST_PRIOR_SHARE = 0.05
"""The prior's variance is at least this share of the variance between the means: else the first runs decide all."""


@dataclass(frozen=True)
class Belief:
    """The true metric of each configuration as a normal distribution; larger is better."""

    mean: Mapping[int, float]
    variance: Mapping[int, float]
    run_variance: float
    """Of one run around its configuration's true metric."""

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


def belief(runs: Mapping[int, Mapping[int, float]], maximize: bool) -> Belief:
    """Return what runs, configuration -> seed -> metric, say; the search's own runs count like all others.

    Before a seed error is known, half of the variance between the runs is taken for it: the order is that of the runs.
    """
    signed = {k: {seed: upward(value, maximize) for seed, value in found.items()} for k, found in runs.items()}
    fit = fit_seeds(signed)
    if fit is not None:
        means = dict(zip(runs, map(float, fit.mean_K), strict=True))
    else:
        means = {k: statistics.fmean(found.values()) for k, found in signed.items()}
    between = statistics.pvariance(means.values()) if len(means) > 1 else 0.0
    smallest = max(between, 1e-12) * 1e-6
    run_variance = max(fit.variance if fit is not None else between / 2, smallest)
    counts = {k: len(found) for k, found in runs.items()}
    chance = statistics.fmean(run_variance / n for n in counts.values())
    prior = max(between - chance, SMALLEST_PRIOR_SHARE * between, smallest)
    centre = statistics.median(means.values())
    variance = {k: 1 / (1 / prior + n / run_variance) for k, n in counts.items()}
    expected = {k: variance[k] * (centre / prior + counts[k] * means[k] / run_variance) for k in means}
    return Belief(expected, variance, run_variance)


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

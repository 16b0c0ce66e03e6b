"""Which candidates the data can tell apart, which cheaper one is good enough, and how small a difference would show.

Two sources of chance are added up: the eval examples (paired bootstrap: every candidate is scored on the same
resamples) and, where configurations ran with several seeds, the seed.

Shapes: K candidates, R resamples, P pairs of candidates.
Sources: P. Hansen, A. Lunde, J. Nason, The Model Confidence Set, Econometrica 79, 2011 (range statistic);
S. Wellek, Testing Statistical Hypotheses of Equivalence and Noninferiority, 2010 (the margin).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
POWER_Z = 0.84
"""Normal quantile of 80 %: a difference counts as visible where four of five studies would show it."""
MAX_CANDIDATES = 150
"""How many of the best trials the confidence set is found among: pairs take K * K * R numbers."""
SEED = 0


@dataclass(frozen=True)
class SeedFit:
    """Runs of several configurations with several seeds, as configuration + seed + rest.

    All configurations that ran with one seed share what that seed does to all alike; it cancels in a difference.
    """

    names: tuple[int, ...]
    mean_K: np.ndarray
    """Of each configuration, at the average seed effect."""
    covariance_KK: np.ndarray
    """Of the means, by the rest alone: what is left of the seeds in a difference."""
    variance: float
    """Of one run, by the rest alone."""
    free: int
    """Degrees of freedom of the rest."""


def fit_seeds(runs: Mapping[int, Mapping[int, float]]) -> SeedFit | None:
    """Return the fit of configuration -> seed -> metric; None with fewer than 2 degrees of freedom.

    Least squares of the additive model; a configuration with one seed takes the residual error from the others.
    """
    names = tuple(runs)
    seeds = sorted({seed for found in runs.values() for seed in found})
    rows = [(k, seeds.index(s), value) for k, name in enumerate(names) for s, value in runs[name].items()]
    if not rows or not all(math.isfinite(value) for _, _, value in rows):
        return None
    design = np.zeros((len(rows), len(names) + len(seeds)))
    for row, (k, s, _) in zip(design, rows, strict=True):
        row[k] = row[len(names) + s] = 1.0
    values = np.array([value for _, _, value in rows])
    values_C, vectors_CC = np.linalg.eigh(design.T @ design)
    in_rank_C = values_C > 1e-9 * values_C.max()
    free = len(rows) - int(in_rank_C.sum())
    if free < 2:
        return None
    inverse = (vectors_CC[:, in_rank_C] / values_C[in_rank_C]) @ vectors_CC[:, in_rank_C].T
    coefficients = inverse @ design.T @ values
    residual = values - design @ coefficients
    # A mean is its configuration's coefficient plus the average over the seeds: that sum does not depend on how the
    # coefficients share out a constant.
    average = np.hstack([np.eye(len(names)), np.full((len(names), len(seeds)), 1 / len(seeds))])
    variance = float(residual @ residual) / free
    return SeedFit(names, average @ coefficients, variance * average @ inverse @ average.T, variance, free)


@dataclass(frozen=True)
class Rivals:
    """Candidates that were scored on the same examples."""

    mean_K: np.ndarray
    """The metric, larger is better."""
    replicates_KR: np.ndarray
    """The metric on each resample of the examples, larger is better."""
    seeds_KK: np.ndarray | None = None
    """Covariance of the means by the seed; None: each candidate is one trained model, and is compared as that."""
    free: float | None = None
    """Degrees of freedom of the seed error."""
    independent: float = math.inf
    """Examples that stand alone and weigh alike, or what tells as much: their error, too, is only estimated."""

    @property
    def by_seeds(self) -> bool:
        return self.seeds_KK is not None

    def error(self, first: int, second: int) -> float:
        """Return the standard error of a difference: over examples and over seeds, added as variances."""
        return math.sqrt(self._example_variance(first, second) + self.seed_variance(first, second))

    def _example_variance(self, first: int, second: int) -> float:
        differences_R = self._finite(self.replicates_KR[first] - self.replicates_KR[second])
        return float(np.var(differences_R, ddof=1)) * self.widened**2

    @property
    def widened(self) -> float:
        """By how much resamples are too near to each other: each draws from one example less than there are."""
        return 1.0 if math.isinf(self.independent) else math.sqrt(self.independent / max(self.independent - 1, 1.0))

    def seed_variance(self, first: int, second: int) -> float:
        """Return the seeds' part of that error's square."""
        if self.seeds_KK is None:
            return 0.0
        c = self.seeds_KK
        return max(0.0, float(c[first, first] + c[second, second] - 2 * c[first, second]))

    def degrees(self, first: int, second: int) -> float:
        """Return the degrees of freedom of that error (Satterthwaite)."""
        seeds, examples = self.seed_variance(first, second), self._example_variance(first, second)
        unsure = examples**2 / self.free_of_examples + (seeds**2 / self.free if self.free else 0.0)
        return (seeds + examples) ** 2 / unsure if unsure else math.inf

    @property
    def free_of_examples(self) -> float:
        return max(self.independent - 1, 1.0)

    @staticmethod
    def _finite(values_R: np.ndarray) -> np.ndarray:
        return values_R[np.isfinite(values_R)]


def difference_interval(rivals: Rivals, first: int, second: int, far: float = 0.0) -> tuple[float, float, float]:
    """Return first minus second (positive: the first is better) and the ends of its two-sided 95 % interval.

    With the threshold of the confidence set as `far`, the intervals of all pairs hold together: those of candidates
    that are not told apart hold 0.
    """
    value = float(rivals.mean_K[first] - rivals.mean_K[second])
    half = max(far, quantile((1 + LEVEL) / 2, rivals.degrees(first, second))) * rivals.error(first, second)
    return value, value - half, value + half


def shown_within(rivals: Rivals, best: int, other: int, margin: float) -> bool:
    """Return whether `other` is shown to be less than `margin` worse than `best`: one-sided, 95 %."""
    return worst_loss(rivals, best, other) < margin


def worst_loss(rivals: Rivals, best: int, other: int) -> float:
    """Return how much worse than `best` the other one may be: the upper end of a one-sided 95 % interval."""
    value = float(rivals.mean_K[best] - rivals.mean_K[other])
    return value + quantile(LEVEL, rivals.degrees(best, other)) * rivals.error(best, other)


def quantile(level: float, free: float) -> float:
    """Return the quantile of Student's t; of the normal distribution with infinite degrees of freedom."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(level) if math.isinf(free) else stdtrit(free, level))


def _as_students(far: float, free: float) -> float:
    """Return as many standard errors as leave the same chance outside where the error is estimated with `free`."""
    from scipy.special import ndtr, stdtrit

    return far if math.isinf(free) or far <= 0 else -float(stdtrit(free, ndtr(-far)))


@dataclass(frozen=True)
class ConfidenceSet:
    """The candidates among which the best one is, with 95 % confidence; the others are told apart from it."""

    inside: tuple[bool, ...]
    threshold: float
    """How many standard errors the largest difference of all pairs may reach by chance (95 % quantile), among all."""


def confidence_set(rivals: Rivals) -> ConfidenceSet:
    """Return the model confidence set: while the largest studentised difference is no chance, its loser leaves.

    Of all pairs, not against the best alone: that one was chosen on the same rows, so comparisons with it by
    themselves (Holm and the like) err far more often than they say.
    """
    order = np.argsort(-rivals.mean_K, kind="stable")[:MAX_CANDIDATES]
    inside = np.zeros(len(rivals.mean_K), bool)
    if len(order) < 2:
        inside[order] = True
        return ConfidenceSet(tuple(map(bool, inside)), math.nan)
    first_P, second_P = np.triu_indices(len(order), 1)
    gap_P = rivals.mean_K[order[first_P]] - rivals.mean_K[order[second_P]]
    noise_PR, error_P = _noise(rivals, order, first_P, second_P)
    known_P = error_P > 0
    observed_P = np.where(known_P, np.abs(gap_P) / np.where(known_P, error_P, 1), np.where(gap_P != 0, np.inf, 0.0))
    observed_P /= rivals.widened
    chance_PR = np.abs(noise_PR) / np.where(known_P, error_P, np.inf)[:, None]
    alive, first_threshold = np.ones(len(order), bool), math.nan
    while alive.sum() > 1:
        among_P = np.flatnonzero(alive[first_P] & alive[second_P])
        # Of many pairs some have an error that came out too small: each is only estimated, as in Student's t.
        threshold = _as_students(float(np.quantile(chance_PR[among_P].max(0), LEVEL)), rivals.free_of_examples)
        if math.isnan(first_threshold):
            first_threshold = threshold
        largest = among_P[np.argmax(observed_P[among_P])]
        if observed_P[largest] <= threshold:
            break
        alive[second_P[largest]] = False  # `order` has the better one first: the loser of the clearest pair leaves
    inside[order[alive]] = True
    return ConfidenceSet(tuple(map(bool, inside)), first_threshold)


def _noise(
    rivals: Rivals, order: np.ndarray, first_P: np.ndarray, second_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return what chance does to the difference of each pair in each resample, [P, R], and its standard error, [P]."""
    replicates_KR = rivals.replicates_KR[order]
    replicates_KR = replicates_KR[:, np.isfinite(replicates_KR).all(0)]
    noise_KR = (replicates_KR - replicates_KR.mean(1, keepdims=True)).astype(np.float32)
    noise_PR = noise_KR[first_P] - noise_KR[second_P]
    variance_P = noise_PR.var(1, ddof=1)
    if rivals.seeds_KK is None:
        return noise_PR, np.sqrt(variance_P)
    rng = np.random.default_rng([SEED, len(order)])
    covariance_KK = rivals.seeds_KK[np.ix_(order, order)]
    values_K, vectors_KK = np.linalg.eigh(covariance_KK)
    root_KK = vectors_KK * np.sqrt(np.maximum(values_K, 0))
    draws_KR = root_KK @ rng.standard_normal((len(order), noise_PR.shape[1]))
    # The seed error itself is only estimated: Student's t, one estimate for all candidates of a resample.
    scale_R = np.sqrt(rivals.free / rng.chisquare(rivals.free, noise_PR.shape[1])) if rivals.free else 1.0
    seeds_KR = (draws_KR * scale_R).astype(np.float32)
    spread_K = np.diag(covariance_KK)
    seeds_P = spread_K[first_P] + spread_K[second_P] - 2 * covariance_KK[first_P, second_P]
    return noise_PR + seeds_KR[first_P] - seeds_KR[second_P], np.sqrt(variance_P + np.maximum(seeds_P, 0))


def smallest_difference(rivals: Rivals, threshold: float) -> float:
    """Return how far two candidates have to lie apart to be told apart in four of five such studies.

    `threshold` is the confidence set's; the error is the median over the pairs with the best candidate.
    """
    best = int(np.argmax(rivals.mean_K))
    errors = [rivals.error(best, k) for k in range(len(rivals.mean_K)) if k != best]
    return (threshold + POWER_Z) * float(np.median(errors))

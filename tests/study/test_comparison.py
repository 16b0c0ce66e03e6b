"""Told apart, near enough, visible: each claim errs as often as it says, on simulated studies with a known truth."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from lorasweep.study import comparison
from lorasweep.study.comparison import Rivals

RESAMPLES = 500


def answers(rng, shares_K, examples, shared=0.9):
    """Return right or wrong [K, N] for models of these accuracies; what is hard for one is mostly hard for all."""
    hard_N = rng.standard_normal(examples)
    own_KN = rng.standard_normal((len(shares_K), examples))
    latent_KN = math.sqrt(shared) * hard_N + math.sqrt(1 - shared) * own_KN
    return (latent_KN < norm.ppf(np.asarray(shares_K))[:, None]).astype(float)


def weights(examples, seed=0):
    return np.random.default_rng(seed).multinomial(examples, [1 / examples] * examples, size=RESAMPLES) / examples


def rivals_of(right_KN, weights_RN):
    return Rivals(right_KN.mean(1), right_KN @ weights_RN.T)


@pytest.mark.parametrize("count", [3, 10, 24])
def test_equal_candidates_are_told_apart_in_about_one_study_of_twenty(count):
    rng, weights_RN, studies = np.random.default_rng(count), weights(400), 300
    false = 0
    for _ in range(studies):
        found = comparison.confidence_set(rivals_of(answers(rng, [0.8] * count, 400), weights_RN))
        false += not all(found.inside)
    assert false / studies == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / studies))


@pytest.mark.parametrize("examples", [50, 200])
def test_equal_losses_of_few_documents_are_told_apart_in_about_one_study_of_twenty(examples):
    """Some pair's error comes out too small where it is estimated from few rows."""
    rng, weights_RN, studies = np.random.default_rng(examples), weights(examples), 300
    false = 0
    for _ in range(studies):
        loss_KN = -rng.lognormal(0, 0.5, examples) - 0.05 * rng.standard_normal((24, examples))
        rivals = Rivals(loss_KN.mean(1), loss_KN @ weights_RN.T, independent=examples)
        false += not all(comparison.confidence_set(rivals).inside)
    assert false / studies == pytest.approx(0.05, abs=3 * math.sqrt(0.05 * 0.95 / studies))


def test_best_candidate_is_in_the_set_and_a_clearly_worse_one_is_not():
    rng, weights_RN = np.random.default_rng(0), weights(2000)
    kept = lost = 0
    for _ in range(60):
        found = comparison.confidence_set(rivals_of(answers(rng, [0.8, 0.8, 0.79, 0.7], 2000), weights_RN))
        kept += found.inside[0] and found.inside[1]
        lost += not found.inside[3]
    assert kept >= 54 and lost == 60


def seeded(rng, qualities_K, seeds, own_sd, common_sd):
    """Return configuration -> seed -> metric, with an effect of each seed on all alike."""
    common_S = common_sd * rng.standard_normal(seeds)
    return {
        k: {s: float(q + common_S[s] + own_sd * rng.standard_normal()) for s in range(seeds)}
        for k, q in enumerate(qualities_K)
    }


def test_what_a_seed_does_to_all_alike_leaves_no_error_in_a_difference():
    runs = {0: {0: 0.5, 1: 0.6, 2: 0.7}, 1: {0: 0.4, 1: 0.5, 2: 0.6}, 2: {0: 0.45, 1: 0.55, 2: 0.65}}
    fit = comparison.fit_seeds(runs)
    assert fit is not None
    assert fit.mean_K == pytest.approx([0.6, 0.5, 0.55]) and fit.free == 4
    assert np.abs(fit.covariance_KK).max() < 1e-25


def test_fit_of_seeds_equals_the_analysis_of_variance_by_hand():
    runs = {0: {0: 1.0, 1: 3.0}, 1: {0: 2.0, 1: 2.0}, 2: {0: 3.0, 1: 7.0}}
    fit = comparison.fit_seeds(runs)
    table = np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 7.0]])
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    variance = (rest**2).sum() / 2
    assert fit.free == 2 and fit.mean_K == pytest.approx(table.mean(1))
    c = fit.covariance_KK
    assert c[0, 0] + c[1, 1] - 2 * c[0, 1] == pytest.approx(2 * variance / 2)


def test_too_few_seeds_say_nothing_of_their_error():
    assert comparison.fit_seeds({0: {0: 1.0}, 1: {0: 2.0}}) is None
    assert comparison.fit_seeds({0: {0: 1.0, 1: 2.0}, 1: {0: 2.0, 1: math.nan}}) is None


def test_equal_settings_that_ran_with_seeds_are_seldom_told_apart():
    rng, weights_RN, studies = np.random.default_rng(5), weights(400), 200
    false = 0
    for _ in range(studies):
        runs = seeded(rng, [0.8] * 4, 3, 0.01, 0.02)
        fit = comparison.fit_seeds(runs)
        models = [answers(rng, [runs[k][s] for k in range(4)], 400) for s in range(3)]
        right_KN = np.mean(models, axis=0)
        rivals = Rivals(right_KN.mean(1), right_KN @ weights_RN.T, fit.covariance_KK, fit.free)
        false += not all(comparison.confidence_set(rivals).inside)
    assert false / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)


def test_interval_of_a_difference_covers_it_in_95_of_100_studies():
    rng, weights_RN, studies = np.random.default_rng(2), weights(400), 400
    covered = 0
    for _ in range(studies):
        rivals = rivals_of(answers(rng, [0.82, 0.8], 400), weights_RN)
        _, low, high = comparison.difference_interval(rivals, 0, 1)
        covered += low <= 0.02 <= high
    assert covered / studies == pytest.approx(0.95, abs=0.035)


def test_near_enough_is_claimed_of_a_candidate_at_the_margin_in_one_study_of_twenty():
    rng, weights_RN, studies = np.random.default_rng(3), weights(2000), 300
    claimed = 0
    for _ in range(studies):
        rivals = rivals_of(answers(rng, [0.82, 0.80], 2000), weights_RN)
        claimed += comparison.shown_within(rivals, 0, 1, 0.02)
    assert claimed / studies == pytest.approx(0.05, abs=0.04)


def test_difference_called_visible_is_seen_in_most_studies():
    rng, weights_RN = np.random.default_rng(4), weights(400)
    rivals = rivals_of(answers(rng, [0.8] * 2, 400), weights_RN)
    visible = comparison.smallest_difference(rivals, comparison.confidence_set(rivals).threshold)
    assert 0.03 < visible < 0.06
    seen = 0
    for _ in range(100):
        found = comparison.confidence_set(rivals_of(answers(rng, [0.8, 0.8 - visible], 400), weights_RN))
        seen += not found.inside[1]
    assert 0.65 < seen / 100 < 0.95


def test_identical_candidates_are_never_told_apart_and_one_alone_is_the_set():
    right_KN = answers(np.random.default_rng(0), [0.8], 400).repeat(3, axis=0)
    assert comparison.confidence_set(rivals_of(right_KN, weights(400))).inside == (True, True, True)
    alone = comparison.confidence_set(rivals_of(right_KN[:1], weights(400)))
    assert alone.inside == (True,) and math.isnan(alone.threshold)

"""What the answer claims, on simulated studies with a known truth: how often it is wrong, and what it costs."""

import math

import numpy as np
import pytest
from optuna.trial import TrialState
from support.drawn import Drawn, challenged, losses, right_or_wrong
from support.effects import KEYS, bars_hold, metric, points, random_search, tpe_search, trial
from support.regret import regrets

from lorasweep.config.spec import SearchSpec
from lorasweep.report import study_data
from lorasweep.study import answer, repeats, significance

pytestmark = pytest.mark.usefixtures("few_resamples")


def rate_of(target, studies):
    """Return a share as three standard errors of the simulation allow."""
    return pytest.approx(target, abs=3 * math.sqrt(target * (1 - target) / studies))


@pytest.mark.parametrize("count", [3, 10, 24])
def test_equal_trained_models_are_told_apart_in_one_study_of_twenty(count):
    rng, studies = np.random.default_rng(count), 120
    false = sum(bool(Drawn(right_or_wrong(rng, [0.8] * count)).search_for(count).worse) for _ in range(studies))
    assert false / studies == rate_of(0.05, studies)


@pytest.mark.parametrize(("count", "studies"), [(3, 50), (10, 30), (24, 25)])
def test_equal_configurations_with_repeats_are_seldom_told_apart(count, studies):
    rng, false, of_models = np.random.default_rng(count), 0, 0
    for _ in range(studies):
        draw = right_or_wrong(rng, [0.8] * count, own_sd=0.02, common_sd=0.02, examples=1000)
        study = Drawn(draw, repeats=3, repeat_top=3)
        found = study.search_for(count)
        assert found.by_seeds or not found.compared
        false += bool(found.worse)
        study.list = [t for t in study.list if not repeats.is_repeat(t)]
        alone = answer.answer(study)
        assert not alone.by_seeds  # one seed each: these are trained models
        of_models += bool(alone.worse)
    assert false / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)
    assert of_models / studies > 0.5  # what the former rule said of configurations


@pytest.mark.parametrize(("count", "own_sd", "common_sd"), [(6, 0.015, 0.01), (24, 0.01, 0.02)])
def test_interval_of_the_winner_holds_the_mean_of_its_configuration(count, own_sd, common_sd):
    rng, studies, held = np.random.default_rng(2), 100, 0
    for _ in range(studies):
        draw = right_or_wrong(rng, [0.8] * count, own_sd=own_sd, common_sd=common_sd, examples=400)
        found = Drawn(draw, repeats=3, repeat_top=3).search_for(count)
        held += found.best.interval.holds(0.8)
    assert 0.89 <= held / studies <= 1.0


def test_what_may_be_as_good_has_an_interval_that_holds_no_difference():
    for seed in range(40):
        found = Drawn(right_or_wrong(np.random.default_rng(seed), [0.8, 0.8, 0.79, 0.78, 0.76, 0.75])).search_for(6)
        assert all(c.gap.interval.low <= 1e-3 for c in found.alike)


def test_cheapest_is_not_one_that_the_same_rows_tell_apart():
    rng, studies, apart, worse = np.random.default_rng(3), 100, 0, 0
    excess = [0.06, 0.03, 0.01, 0.005, 0.0]
    for _ in range(studies):
        found = Drawn(losses(rng, excess), metric="loss", maximize=False).search_for(5)
        assert found.cheapest is not None
        apart += found.cheapest.alike is False
        worse += excess[found.cheapest.number] > 0.0125
    assert apart / studies < 0.05 and worse / studies < 0.05


def test_metric_without_the_choice_is_that_of_the_model():
    rng, studies, chosen, corrected = np.random.default_rng(4), 60, [], []
    for _ in range(studies):
        found = Drawn(right_or_wrong(rng, [0.8] * 10)).search_for(10)
        chosen.append(found.best.value - 0.8)
        corrected.append(found.corrected - 0.8)
    assert np.mean(chosen) > 0.01
    assert abs(np.mean(corrected)) < 0.6 * np.mean(chosen)


def test_one_poor_configuration_with_two_seeds_does_not_hide_a_far_better_one():
    draw = right_or_wrong(np.random.default_rng(12), [0.5, 0.6, 0.61, 0.9], own_sd=0.005)
    study = Drawn(draw)
    for k, seed in ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1)):
        study._run(k, seed, {"overrides": [f"lora.r={k}", f"train.seed={seed}"], "swept": {"lora.r": k}})
    found = answer.answer(study)
    assert found.best.number == 3 and not found.by_seeds and [c.number for c in found.worse] == [0, 1, 2]


def test_configuration_whose_repeat_did_not_end_complete_is_not_chosen():
    study = Drawn(right_or_wrong(np.random.default_rng(5), [0.9, 0.8]), repeats=2, repeat_top=2)
    assert study.search_for(2).best.number == 0
    broken = next(t for t in study.list if t.user_attrs.get("repeat_of") == 0)
    broken.state = TrialState.PRUNED
    found = answer.answer(study)
    assert found.best.number == 1
    assert next(c for c in found.candidates if c.number == 0).failed == (broken.number,)


def test_runs_that_differ_in_their_seed_alone_are_one_configuration():
    draw = right_or_wrong(np.random.default_rng(6), [0.8, 0.7], own_sd=0.01)
    study = Drawn(draw)
    for k in (0, 1):
        for seed in (0, 1, 2):
            study._run(k, seed, {"overrides": [f"lora.r={k}", f"train.seed={seed}"], "swept": {"train.seed": seed}})
    found = answer.answer(study)
    assert [c.number for c in found.candidates] == [0, 3] and found.by_seeds
    assert found.best.value == pytest.approx(np.mean([t.values[0] for t in study.list[:3]]))


@pytest.mark.parametrize(("own_sd", "seed_free"), [(0.0, 0), (0.01, 0), (0.02, 0), (0.01, 8), (0.02, 3)])
def test_best_of_many_does_not_replace_an_equally_good_champion(own_sd, seed_free):
    rng = np.random.default_rng(7)
    assert np.mean([challenged(rng, 24, own_sd, 400, seed_free) for _ in range(60)]) < 0.05


def test_test_interval_of_the_winner_holds_its_truth_though_its_eval_metric_is_too_high():
    rng, held, above = np.random.default_rng(8), [], []
    for _ in range(200):
        shares = 0.8 + 0.01 * rng.standard_normal(24)
        draw = right_or_wrong(rng, shares)
        values = [draw(k, 0)[0] for k in range(24)]
        truth = shares[int(np.argmax(values))]
        held.append(significance.interval(right_or_wrong(rng, [truth])(0, 0)[1]).holds(truth))
        above.append(max(values) - truth)
    assert 0.9 <= np.mean(held) <= 0.99 and np.mean(above) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "studies"), [(1, 1000), (3, 1200)])
def test_repeats_leave_less_regret_than_by_the_former_rule(budget, studies):
    lost_N2 = np.concatenate([regrets(seed_sd, budget, studies)[0] for seed_sd in (0.5, 1.0, 2.2)])
    gained_N = lost_N2[:, 0] - lost_N2[:, 1]
    assert gained_N.mean() > 2 * gained_N.std() / math.sqrt(len(gained_N))


@pytest.mark.parametrize(("search", "sampler", "studies"), [(random_search, "random", 60), (tpe_search, "tpe", 20)])
def test_bars_of_an_effect_hold_the_mean_or_are_not_drawn(search, sampler, studies):
    rng, would, drawn = np.random.default_rng(11), [], []
    population = [trial(p, metric(p)) for p in points(rng, 4000)]
    is_designed = study_data.is_designed(SearchSpec(sampler=sampler, pruner="none"))
    for _ in range(studies):
        trials = search(rng, 48)
        for key in KEYS:
            would += bars_hold(trials, population, key)
            drawn += bars_hold(trials, population, key, sure=is_designed)
    near = 3 * math.sqrt(0.05 * 0.95 / len(would))
    if is_designed:
        assert 0.92 - near < np.mean(drawn) < 0.98 + near and drawn == would
    else:
        assert np.mean(would) < 0.92 - near and not drawn

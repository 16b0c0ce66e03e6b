"""All runs choose; the next repeat goes where it helps the choice most."""

import numpy as np
import pytest

from lorasweep.study.belief import belief, expected_gain, near_enough


def test_one_run_each_keeps_the_order_and_is_pulled_to_the_middle():
    found = belief({0: {0: 0.5}, 1: {0: 0.7}, 2: {0: 0.9}}, maximize=True)
    assert found.best == 2 and 0.7 < found.mean[2] < 0.9
    assert belief({0: {0: 0.5}, 1: {0: 0.7}, 2: {0: 0.9}}, maximize=False).best == 0


def test_lucky_run_is_believed_less_than_a_steady_mean():
    runs = {0: {0: 0.80}, 1: {0: 0.79, 1: 0.80, 2: 0.79}, 2: {0: 0.79, 1: 0.72, 2: 0.76}, 3: {0: 0.75}, 4: {0: 0.76}}
    assert belief(runs, maximize=True).best == 1


def test_next_run_goes_to_a_rival_of_the_best_and_not_to_a_hopeless_one():
    runs = {0: {0: 0.80, 1: 0.78}, 1: {0: 0.79, 1: 0.80}, 2: {0: 0.50, 1: 0.51}, 3: {0: 0.79}}
    found = belief(runs, maximize=True)
    assert found.gain(3) > found.gain(2)
    assert max(runs, key=found.gain) in (0, 1, 3)
    assert found.gain(2) < found.gain(1)


def test_gain_equals_the_expected_improvement_by_simulation():
    found = belief({0: {0: 0.80, 1: 0.77}, 1: {0: 0.78, 1: 0.80}, 2: {0: 0.70, 1: 0.73}}, maximize=True)
    rng = np.random.default_rng(0)
    before, name = max(found.mean.values()), 2
    truth = found.mean[name] + np.sqrt(found.variance[name]) * rng.standard_normal(400_000)
    seen = truth + np.sqrt(found.run_variance) * rng.standard_normal(len(truth))
    weight = found.variance[name] / (found.variance[name] + found.run_variance)
    after = found.mean[name] + weight * (seen - found.mean[name])
    expected = np.maximum(after, max(m for k, m in found.mean.items() if k != name)).mean() - before
    assert found.gain(name) == pytest.approx(expected, abs=3e-5)


def test_equal_runs_leave_nothing_to_gain():
    found = belief({0: {0: 0.8, 1: 0.8}, 1: {0: 0.8, 1: 0.8}}, maximize=True)
    assert found.gain(0) == pytest.approx(0, abs=1e-6)
    assert belief({4: {0: 0.8}}, maximize=True).gain(4) == 0


def test_expected_gain_of_more_draws_equals_a_simulation():
    rng = np.random.default_rng(0)
    values = list(rng.normal(0.7, 0.02, 40))
    best, spread = max(values), np.std(values, ddof=1)
    drawn = np.mean(values) + spread * (1 + 1 / 40) ** 0.5 * rng.standard_t(39, (200_000, 10))
    assert expected_gain(values, 10) == pytest.approx(np.maximum(drawn.max(1) - best, 0).mean(), rel=0.03)
    assert expected_gain(values, 10) > expected_gain(values, 1) > 0
    assert expected_gain([0.5] * 8, 10) == 0


def test_near_enough_is_a_point_or_a_hundredth_of_a_loss():
    assert near_enough(None, (0.0, 1.0), 0.8) == 0.01
    assert near_enough(None, (0.0, float("inf")), 2.5) == pytest.approx(0.025)
    assert near_enough(0.3, (0.0, 1.0), 0.8) == 0.3


def test_what_the_choice_leaves_open_equals_a_simulation():
    found = belief({0: {0: 0.80, 1: 0.77}, 1: {0: 0.78, 1: 0.80}, 2: {0: 0.77, 1: 0.76}, 3: {0: 0.79}}, maximize=True)
    mean_K, variance_K = (np.array(list(side.values())) for side in (found.mean, found.variance))
    truth_SK = mean_K + np.sqrt(variance_K) * np.random.default_rng(0).standard_normal((400_000, 4))
    assert found.left_open() == pytest.approx(truth_SK.max(1).mean() - mean_K.max(), rel=0.02)
    assert found.left_open() > max(map(found.gain, found.mean))  # no number of runs gains more than the truth


def test_long_tail_of_bad_configurations_does_not_make_the_good_ones_seem_far_apart():
    good = {0: {0: 0.80}, 1: {0: 0.79}, 2: {0: 0.78}, 3: {0: 0.77}, 4: {0: 0.76}}
    even, tail = (belief(good | {5 + k: {0: v} for k, v in enumerate(rest)}, True) for rest in ([0.75] * 4, [0.3] * 4))
    assert tail.mean[0] - tail.mean[1] == pytest.approx(even.mean[0] - even.mean[1])


def test_two_runs_alike_by_chance_are_not_taken_for_all_there_is_of_seed_error():
    runs = {k: {0: 0.70 + 0.02 * k} for k in range(8)}
    runs[7][1], runs[6][1], runs[5][1] = 0.83999, 0.82, 0.80001
    assert belief(runs, maximize=True).run_variance > 1e-5

"""What is said of a study that runs: how long yet, and how likely more trials change the best."""

from random import Random

import numpy as np
import pytest

from lorasweep.study import prospects


def played(trials: int, at_once: int, prune: float, seed: int) -> tuple[list[float], float]:
    """Run trials on a machine that takes the same work a second, however many share it; return the relative error of
    each estimate from the first fifth on, and the whole time.
    """
    chance = Random(seed)
    ends = [chance.choice([1 / 16, 1 / 4]) if chance.random() < prune else 1.0 for _ in range(trials)]
    clock, ended, waiting = 0.0, [], list(range(trials))
    running: dict[int, list[float]] = {}
    seen: list[tuple[float, float | None]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            running[waiting.pop(0)] = [0.0, clock]
        tick = 0.01
        clock += tick * len(running) * 60
        for number in list(running):
            running[number][0] += tick
            if running[number][0] >= ends[number] - 1e-9:
                ended.append(ends[number])
                del running[number]
        shares = [(share, clock - began) for share, began in running.values()]
        seen.append((clock, prospects.seconds_left(ended, shares, len(waiting), clock)))
    return [(left - (clock - at)) / (clock - at) for at, left in seen if clock / 5 < at < 0.9 * clock], clock


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_time_left_is_right_within_a_quarter_from_the_first_fifth_on(at_once):
    for seed in range(5):
        errors, _ = played(24, at_once, 0.0, seed)
        assert max(map(abs, errors)) < 0.25


def test_trials_that_the_pruner_ends_are_counted_on():
    """At random which trials end early: the estimate is right on average, and all but for chance within a quarter."""
    errors = [e for seed in range(20) for e in played(60, 4, 0.6, seed)[0]]
    assert abs(np.median(errors)) < 0.1
    assert np.mean(np.abs(errors) < 0.25) > 0.7


def test_nothing_is_said_before_a_step_and_no_study_ends_before_its_slowest_trial():
    assert prospects.seconds_left([], [(0.0, 0.0)], 3, 5.0) is None
    assert prospects.seconds_left([1.0] * 7, [(0.5, 60.0)], 0, 10.0) == pytest.approx(60.0)


def test_survival_counts_what_still_runs_as_far_as_it_is():
    lives = prospects.survival([0.25, 1.0], [0.5, 0.1])
    assert list(lives.ends) == [0.25] and lives.goes_on[0] == pytest.approx(2 / 3)
    assert lives.mean_left(0.0) == pytest.approx(0.25 + 0.75 * 2 / 3)
    assert lives.mean_left(0.5) == pytest.approx(0.5)


def test_chance_that_more_trials_are_better_is_as_often_right():
    rng = np.random.default_rng(0)
    said, happened = [], []
    for _ in range(1500):
        first, more = rng.normal(size=8), rng.normal(size=4)
        said.append(prospects.chance_of_better(first.tolist(), 0, 4, 0.2))
        happened.append(more.max() > first.max() + 0.2)
    assert np.mean(said) == pytest.approx(np.mean(happened), abs=0.04)


def test_pruned_trials_make_better_ones_less_likely_and_few_say_nothing():
    values = [0.5, 0.6, 0.7]
    without, beside = (prospects.chance_of_better(values, pruned, 5, 0.01) for pruned in (0, 3))
    assert 0 < beside < without < 1
    assert prospects.chance_of_better(values[:2], 0, 5, 0.01) is None
    assert prospects.chance_of_better(values, 0, 0, 0.01) is None

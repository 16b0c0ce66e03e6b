"""What auto comes to: a grid where every point can be tried, else by the number of trials."""

import pytest

from lorasweep.config.spec import SearchSpec
from lorasweep.search import choice, space

RANKS, RATES = "lora.r=4,8,16", "train.learning_rate=tag(log,interval(1e-4,1e-2))"


def settled(*words: str, **search: object) -> SearchSpec:
    where, problems = space.read(list(words))
    assert problems == []
    return choice.settled(SearchSpec(**search), where)


def said(*words: str, **search: object) -> list[str]:
    return choice.said(SearchSpec(**search), settled(*words, **search))


@pytest.mark.parametrize("trials", [None, 3, 20])
def test_every_point_that_can_be_tried_is_and_nothing_is_said(trials):
    found = settled(RANKS, trials=trials)
    assert (found.sampler, found.pruner) == ("grid", "none")
    assert said(RANKS, trials=trials) == []


def test_more_trials_get_a_model_and_many_a_pruner():
    found = [settled(RANKS, RATES, trials=n) for n in (2, 6, 12, 24, 200)]
    assert [s.sampler for s in found] == ["qmc", "qmc", "tpe", "tpe", "tpe"]
    assert [s.pruner for s in found] == ["none", "none", "none", "asha", "asha"]
    assert [s.startup_trials for s in found] == [2, 2, 4, 8, 10]
    assert settled(RANKS, RATES).sampler == "tpe", "20 trials where nothing says how many"


def test_what_is_asked_for_stays():
    asked = {"sampler": "random", "pruner": "median", "startup_trials": 7, "in_flight": 2, "trials": 30}
    found = settled(RANKS, RATES, **asked)
    assert {key: getattr(found, key) for key in asked} == asked
    assert settled(RANKS, sampler="grid").sampler == "grid"


def test_choice_and_its_reason_are_said():
    (line,) = said(RANKS, RATES, trials=12)
    assert line.startswith("search.sampler=tpe (12 trials are enough to learn from), search.pruner=none (")
    assert "4 points to begin with" in line and "3 results for the first, 7 for the last" in line


def test_first_points_are_as_many_as_workers_and_recipes():
    assert settled(RANKS, RATES, trials=12, workers=8).startup_trials == 8
    assert settled(RANKS, RATES, trials=12, enqueue=["lora.r=4"] * 6).startup_trials == 6


def test_search_that_would_see_nothing_is_warned_of():
    blind = said(RANKS, RATES, trials=12, sampler="tpe", workers=12)[-1]
    assert blind.startswith("12 trials at 12 workers: tpe sees no result before the last draw")
    blind = said(RANKS, RATES, trials=10, sampler="gp", startup_trials=10)[-1]
    assert blind.startswith("10 trials at search.startup_trials=10: gp sees no result before the last draw")
    for workers in (1, 2, 8):
        assert len(said(RANKS, RATES, trials=12, workers=workers)) == 1
    assert len(said(RANKS, RATES, trials=12, sampler="random", workers=12)) == 1

"""Whose results a draw sees, by its place in line."""

import optuna
import pytest
from optuna.trial import TrialState

from lorasweep.config.spec import SearchSpec
from lorasweep.search import order
from lorasweep.search.order import Line

SEARCH = SearchSpec(sampler="tpe", startup_trials=2)


def trials(*states: str, **attributes: object) -> list[optuna.trial.FrozenTrial]:
    """Return trials in these states: of those that have begun, points are known."""
    found = []
    for number, state in enumerate(states):
        known = {} if state == "WAITING" else {"overrides": []}
        trial = optuna.create_trial(
            state=TrialState[state], value=1.0 if state == "COMPLETE" else None, user_attrs=known | attributes
        )
        trial.number = number
        found.append(trial)
    return found


@pytest.mark.parametrize("in_flight", [1, 2, 8, 100])
def test_each_draw_of_a_model_sees_a_result_and_half_of_those_before_it(in_flight):
    for startup in (1, 2, 5, 10):
        for place in range(200):
            seen = order.sees(place, startup, in_flight)
            if place < startup:
                assert seen == 0
            else:
                assert place - in_flight < seen <= place
                assert seen >= max(1, place / 2)


def test_later_draws_never_see_less():
    found = [order.sees(place, 4, 8) for place in range(100)]
    assert found == sorted(found)


def test_number_in_flight_grows_with_the_workers_alone():
    assert [order.in_flight(SearchSpec(workers=n)) for n in (1, 2, 8)] == [8, 8, 32]
    assert order.in_flight(SearchSpec(workers=8, in_flight=3)) == 3


def test_first_draws_wait_for_nothing_and_the_next_ones_for_their_results():
    def following(*states: str) -> int | None:
        found = Line(trials(*states), SEARCH, learns=True).next()
        return None if found is None else found.number

    assert following("RUNNING", "WAITING", "WAITING") == 1
    assert following("RUNNING", "RUNNING", "WAITING") is None, "trial 2 sees what trial 0 comes to"
    assert following("COMPLETE", "RUNNING", "WAITING") == 2
    assert following("FAIL", "RUNNING", "WAITING") == 2, "what fails has ended too"
    assert following("RUNNING", "COMPLETE", "WAITING") is None, "results count in line, not as they come"
    assert following("COMPLETE", "COMPLETE") is None


def test_points_are_drawn_one_after_the_other():
    waits = trials("COMPLETE", "WAITING", "WAITING")
    waits[1].state = TrialState.RUNNING  # claimed, and not drawn yet
    assert Line(waits, SEARCH, learns=False).next() is None


def test_what_a_draw_may_not_know_yet_is_under_way_for_it():
    before = trials(*["COMPLETE"] * 6, "RUNNING")
    before[5].intermediate_values = {1: 0.5}
    seen = Line(before, SEARCH, learns=True).seen_by(6)
    assert [t.state.name for t in seen] == ["COMPLETE"] * 4 + ["RUNNING"] * 3
    assert seen[5].values is None and seen[5].intermediate_values == {}
    assert before[5].values == [1.0], "the trial itself stays as it is"


def test_repeats_added_trials_and_those_of_other_studies_stand_in_no_line():
    for key in ("repeat_of", "baseline", "origin", order.ADDED, "retry_of"):
        beside = trials("COMPLETE", **{key: 1})
        beside[0].number = 7
        line = Line([*trials("COMPLETE", "COMPLETE", "WAITING"), *beside], SEARCH, learns=True)
        assert 7 not in line and line.next().number == 2
        assert (7 in [t.number for t in line.seen_by(2)]) is (key not in ("repeat_of", "baseline"))


def test_results_of_an_earlier_study_stand_for_the_first_trials():
    teachers = trials("COMPLETE", "COMPLETE", origin="outputs/other")
    blank = trials("WAITING")[0]
    blank.number = 2
    line = Line([*teachers, blank], SEARCH, learns=True)
    assert line.startup == 0 and line.models(2)

"""What a pruned trial counts as where a sampler learns from ends."""

import optuna
from optuna.trial import TrialState

from lorasweep.search.expected_end import with_ends


def trial(state: TrialState, values: list[float] | None, shown: dict[int, float]) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(state=state, values=values, intermediate_values=shown)


COMPLETE = [
    trial(TrialState.COMPLETE, [0.6], {10: 0.3, 20: 0.5}),
    trial(TrialState.COMPLETE, [0.8], {10: 0.4, 20: 0.6}),
    trial(TrialState.COMPLETE, [0.9], {10: 0.4, 20: 0.7}),
]


def test_pruned_trial_ends_by_as_much_better_as_others_did_from_where_it_was_pruned():
    found = with_ends([*COMPLETE, trial(TrialState.PRUNED, None, {10: 0.1})])
    assert found[:3] == COMPLETE
    assert found[3].state == TrialState.COMPLETE and found[3].values == [0.1 + 0.4]


def test_pruned_trial_without_company_at_its_step_says_nothing():
    alone = [trial(TrialState.PRUNED, None, {15: 0.1}), trial(TrialState.PRUNED, None, {})]
    assert with_ends([*COMPLETE, alone[0]]) == COMPLETE
    assert with_ends([COMPLETE[0], trial(TrialState.PRUNED, None, {10: 0.1})]) == COMPLETE[:1]


def test_trials_under_way_stay_and_several_objectives_are_left_as_they_are():
    running = trial(TrialState.RUNNING, None, {10: 0.5})
    assert with_ends([*COMPLETE, running]) == [*COMPLETE, running]
    two = [trial(TrialState.COMPLETE, [0.6, 1.0], {}), trial(TrialState.PRUNED, None, {10: 0.1})]
    assert with_ends(two) == two

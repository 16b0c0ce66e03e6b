"""Which parameters matter: right on a known function, silent on noise, and not misled by who survived a pruner."""

import random

import optuna
import pytest
from optuna.trial import TrialState

from lorasweep.report import importance

RATE = optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)
RANK = optuna.distributions.CategoricalDistribution([4, 8])
KNOWN = {"a.rate": RATE, "b.rank": RANK}


def ended(params: dict, value: float, **more) -> optuna.trial.FrozenTrial:
    return optuna.create_trial(value=value, params=params, distributions=KNOWN, **more)


def drawn(count: int, metric, seed: int = 0) -> list[optuna.trial.FrozenTrial]:
    """Return trials at random points with metric(log10 of the rate, rank)."""
    draw, trials = random.Random(seed), []
    for _ in range(count):
        exponent, rank = draw.uniform(-5, -1), draw.choice([4, 8])
        trials.append(ended({"b.rank": rank, "a.rate": 10**exponent}, metric(exponent, rank, draw)))
    return trials


def test_logarithmic_range_is_looked_at_on_its_scale():
    trials = drawn(40, lambda exponent, rank, draw: -abs(exponent + 4) + 0.1 * (rank == 8))
    found, why = importance.importances(trials, ["b.rank", "a.rate"])
    assert list(found) == ["a.rate", "b.rank"] and why == ""
    assert found["a.rate"] > 0.8 and sum(found.values()) <= 1


def test_shares_are_of_the_whole_variance_noise_included():
    trials = drawn(60, lambda exponent, rank, draw: exponent + draw.gauss(0, 1.2))
    found, _ = importance.importances(trials, ["b.rank", "a.rate"])
    assert 0.15 < sum(found.values()) < 0.75  # of a variance whose half is noise
    said = importance.summary(found, "accuracy", 60, None)
    assert said.startswith("a.rate predicts") and "no parameter predicts" in said


def test_noise_has_no_important_parameter():
    named = 0
    for seed in range(8):
        trials = drawn(24, lambda exponent, rank, draw: draw.gauss(0, 1), seed)
        found, why = importance.importances(trials, ["b.rank", "a.rate"])
        named += bool(found)
        assert found or "No parameter predicts the metric" in why
    assert named <= 3


def test_pruned_trials_count_with_what_they_had_at_a_common_step():
    """The rate decides who survives: among survivors it explains nothing, among all of them nearly everything."""
    draw, trials = random.Random(1), []
    for _ in range(40):
        exponent, rank = draw.uniform(-5, -1), draw.choice([4, 8])
        early = -abs(exponent + 3)
        params = {"a.rate": 10**exponent, "b.rank": rank}
        if early > -0.6:
            values = {10: early, 20: 1.0 + 0.01 * (rank == 8)}
            trials.append(ended(params, values[20], intermediate_values=values))
        else:
            known = {"state": TrialState.PRUNED, "intermediate_values": {10: early}}
            trials.append(optuna.create_trial(params=params, distributions=KNOWN, **known))
    found, step = importance.at_common_step(trials)
    assert step == 10 and len(found) == 40
    shares, _ = importance.importances(found, ["b.rank", "a.rate"])
    assert shares["a.rate"] > 0.8
    alone, step = importance.at_common_step([t for t in trials if t.state == TrialState.COMPLETE])
    assert step is None and len(alone) < 40


@pytest.mark.parametrize(
    ("keys", "count", "words"),
    [(["a"], 20, "Only one parameter"), (["a", "b"], 7, "at least 8"), (["a", "b"], 9, "same metric")],
)
def test_why_there_is_none_is_said(keys, count, words):
    known = {k: optuna.distributions.FloatDistribution(0, 1) for k in keys}
    trials = [
        optuna.create_trial(value=0.5, params={k: i / 20 for k in keys}, distributions=known) for i in range(count)
    ]
    found, why = importance.importances(trials, keys)
    assert found == {} and words in why

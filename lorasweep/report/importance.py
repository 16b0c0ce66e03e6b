"""Which parameters a study's metric depends on: fANOVA on a random forest, where the forest predicts anything at all.

Shares are of the whole variance of the metric between trials: what no parameter predicts is nobody's share.
Source: F. Hutter, H. Hoos, K. Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, 2014.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

FEWEST_TRIALS = 8
"""Trials below which parameter importance is chance."""
MAX_TRIALS, TREES = 200, 32
"""Trials that the fANOVA forest sees, and its trees; more cost seconds and change little."""
OUT_OF_BAG_TREES = 200
"""Of the forest that is tried on trials it has not seen: each trial is left out of a third of them."""
LEAF = 3
"""Trials at the end of a branch there: single ones would be learned by heart, noise and all."""
FEWEST_REACH = 0.9
"""Share of the ended trials that have to have been evaluated at the step at which pruned ones are compared."""
PRUNED_SHARE = 0.25
"""Share of pruned trials from which finished ones alone would be survivors, all with good values of what matters."""


def at_common_step(ended: Sequence[FrozenTrial]) -> tuple[list[FrozenTrial], int | None]:
    """Return the trials to judge parameters by, and at which step: None where it is each one's end.

    Where a pruner has ended many, all count with what they had at the last step that nearly all of them reached.
    """
    complete = [t for t in ended if t.state == TrialState.COMPLETE and t.values and math.isfinite(t.values[0])]
    pruned = [t for t in ended if t.state == TrialState.PRUNED and t.intermediate_values]
    if len(pruned) < PRUNED_SHARE * (len(complete) + len(pruned)):
        return complete, None
    both = [t for t in [*complete, *pruned] if t.intermediate_values]
    steps = sorted(set().union(*(t.intermediate_values for t in both)), reverse=True)
    for step in steps:
        reached = [t for t in both if math.isfinite(t.intermediate_values.get(step, math.nan))]
        if len(reached) >= FEWEST_REACH * len(both):
            return [_with_value(t, t.intermediate_values[step]) for t in reached], step
    return [], None


def _with_value(trial: FrozenTrial, value: float) -> FrozenTrial:
    return optuna.create_trial(value=value, params=trial.params, distributions=trial.distributions)


def importances(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> tuple[dict[str, float], str]:
    """Return each parameter's share of the metric's variance, the largest first, and what is missing or why."""
    if len(keys) < 2:
        return {}, "Only one parameter varies, so all the difference between trials is its own, or noise."
    if len(trials) < FEWEST_TRIALS:
        return {}, f"Importance needs at least {FEWEST_TRIALS} trials to compare; there are {len(trials)}."
    always = [k for k in keys if _varies(trials, k)]
    values = [t.values[0] for t in trials]
    if not always or max(values) == min(values):
        return {}, "All trials have the same metric, or no parameter is set in all of them."
    recent = [_scored(t, always) for t in trials[-MAX_TRIALS:]]
    predicted = predicted_share(recent, always)
    if predicted <= 0:
        return {}, (
            f"No parameter predicts the metric of a trial that was left out (out-of-bag R² {predicted:.2f} over "
            f"{len(recent)} trials): the differences may be noise."
        )
    memory = optuna.create_study()
    memory.add_trials(recent)
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    found = optuna.importance.get_param_importances(memory, evaluator=evaluator, params=always)
    missing = [k for k in keys if k not in always]
    why = f"Not rated, because not every trial sets it: {', '.join(missing)}." if missing else ""
    return {k: predicted * share for k, share in sorted(found.items(), key=lambda item: -item[1])}, why


def _varies(trials: Sequence[FrozenTrial], key: str) -> bool:
    """Tell whether every trial sets a parameter, and not all to one value."""
    values = {str(t.params.get(key)) for t in trials}
    return len(values) > 1 and all(key in t.params for t in trials)


def predicted_share(trials: Sequence[FrozenTrial], keys: Sequence[str]) -> float:
    """Return the out-of-bag R² of a random forest: how much of the variance parameters predict in unseen trials."""
    from sklearn.ensemble import RandomForestRegressor

    columns: list[list[float]] = []
    for key in keys:
        columns += _columns([t.params[key] for t in trials], trials[0], key)
    forest = RandomForestRegressor(OUT_OF_BAG_TREES, min_samples_leaf=LEAF, oob_score=True, random_state=0)
    forest.fit(np.array(columns, float).T, [t.values[0] for t in trials])
    return float(forest.oob_score_)


def _columns(values: Sequence[object], trial: FrozenTrial, key: str) -> list[list[float]]:
    """Return a parameter as the forest sees it: a number, or a column for each choice."""
    if not isinstance(trial.distributions[key], CategoricalDistribution):
        return [[float(v) for v in values]]  # type: ignore[arg-type]
    texts = np.array(list(map(str, values)))
    return [(texts == name).astype(float).tolist() for name in np.unique(texts)]


def _scored(trial: FrozenTrial, keys: Sequence[str]) -> FrozenTrial:
    """Return a trial with these parameters and its primary metric alone.

    What is searched on a logarithmic scale stands there by its logarithm: the forest would look at the upper end alone.
    """
    params = {k: trial.params[k] for k in keys}
    distributions: dict[str, optuna.distributions.BaseDistribution] = {k: trial.distributions[k] for k in keys}
    for key, known in list(distributions.items()):
        if isinstance(known, FloatDistribution | IntDistribution) and known.log:
            params[key] = math.log(params[key])
            distributions[key] = FloatDistribution(math.log(known.low), math.log(known.high))
    return optuna.create_trial(value=trial.values[0], params=params, distributions=distributions)


def summary(shares: Mapping[str, float], metric: str, count: int, step: int | None) -> str:
    """Return what the shares say, in a sentence."""
    first, share = next(iter(shares.items()))
    rest = 1 - sum(shares.values())
    where = "of finished trials" if step is None else f"at step {step}, which pruned ones reached too,"
    return (
        f"{first} predicts {share:.0%} of the variance in {metric} {where} among {count} trials, the most of "
        f"{len(shares)} parameters; {rest:.0%} no parameter predicts (random forest, fANOVA, out-of-bag R²)."
    )

"""Where a pruned trial would have ended, for samplers that learn from ends alone."""

import copy
import statistics
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

FEWEST = 2
"""Complete trials that have reported at a step, to say what is still to come after it."""


def with_ends(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials, those that were pruned as complete ones with the metric that they would have come to: by as
    much better than when they ended as others have become from there on, in the middle of those.

    A pruned trial that nobody can be compared with is left out. Several objectives are known at the end alone.
    """
    complete = [t for t in trials if t.state == TrialState.COMPLETE and t.values is not None]
    if any(len(t.values) > 1 for t in complete):
        return list(trials)
    out = []
    for trial in trials:
        step = trial.last_step
        if trial.state != TrialState.PRUNED or step is None:
            out.append(trial)
            continue
        gains = [t.values[0] - t.intermediate_values[step] for t in complete if step in t.intermediate_values]
        if len(gains) >= FEWEST:
            seen = copy.copy(trial)
            seen.state, seen.values = TrialState.COMPLETE, [trial.intermediate_values[step] + statistics.median(gains)]
            out.append(seen)
    return out

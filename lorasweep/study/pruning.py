"""Whether a running trial of a study is to end early."""

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from lorasweep.config.spec import SearchSpec
from lorasweep.search import pruners, samplers
from lorasweep.search.order import Line
from lorasweep.search.space import Space
from lorasweep.study import repeats
from lorasweep.study.drawing import is_own
from lorasweep.study.queue import MAY_BE_PRUNED


def should_prune(
    trial: FrozenTrial,
    study: optuna.Study,
    search: SearchSpec,
    space: Space,
    *,
    maximize: bool,
    total_steps: int,
    warmup_ratio: float = 0.0,
) -> bool:
    """Return whether the pruner ends a trial at the step it reported last.

    Other trials are read only where it may look at that step.
    """
    looks = pruners.window(search, total_steps, warmup_ratio)
    is_the_searchs = repeats.is_searched(trial) and trial.user_attrs.get(MAY_BE_PRUNED, True)
    if not is_the_searchs or trial.last_step not in looks:
        return False
    trials = study.get_trials(deepcopy=False)
    line = Line(trials, search, samplers.learns(search))
    in_order = samplers.learns(search) and trial.number in line
    seen = line.seen_by(trial.number) if in_order else None
    searched = [t for t in trials if is_own(t) and repeats.is_searched(t)] if seen is None else seen
    rivals = [*searched, *(line.after(trial.number) if in_order else ())]
    if pruners.is_spared(trial, rivals, search.min_complete, maximize):
        return False
    if any(pruners.is_spared(trial, group, 1, maximize) for group in _asked_about(trial, searched, search, space)):
        return False
    pruner = pruners.make_pruner(search, total_steps, warmup_ratio)
    return pruners.should_prune(pruner, study, trial, pruners.rungs(search, total_steps, warmup_ratio), seen)


def _asked_about(
    trial: FrozenTrial, trials: Sequence[FrozenTrial], search: SearchSpec, space: Space
) -> list[list[FrozenTrial]]:
    """Return for each key that search.question asks about the trials that have what a trial has for it."""
    asked = search.question if isinstance(search.question, list) else []
    swept = trial.user_attrs["swept"]
    groups = []
    for d in [d for d in space.dimensions if d.key in asked and d.key in swept]:
        known = [t for t in trials if d.key in t.user_attrs.get("swept", {})]
        groups.append([t for t in known if d.part(t.user_attrs["swept"][d.key]) == d.part(swept[d.key])])
    return groups

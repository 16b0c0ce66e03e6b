"""Repeats: the best configurations of a study run again with other seeds, and the mean of those decides.

The run of the search is left out of the mean: it was chosen for being high, so it is too high on average.

A repeat is a trial of the study with the user attributes `repeat_of` (the trial that it repeats) and `repeat` (1, 2,
...; a round has one repeat for each candidate, all with the same seed). Samplers and pruners do not see repeats.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.trial import FrozenTrial, TrialState

MOST_SEED = 2**32


@dataclass(frozen=True)
class Race:
    """Who is repeated; kept with the study, so that `resume` goes on with the same."""

    candidates: tuple[int, ...] = ()
    dropped: Mapping[int, int] = field(default_factory=dict)
    """Candidate -> the round after which it could not reach the best any more."""
    seed: int = 0
    """Round n trains with seed + n: seeds that the search has not used."""
    searched: int = 0
    """Complete trials of the search when the candidates were chosen."""

    @property
    def live(self) -> list[int]:
        return [n for n in self.candidates if n not in self.dropped]

    def to_dict(self) -> dict[str, Any]:
        dropped = {str(n): r for n, r in self.dropped.items()}
        return {**vars(self), "candidates": list(self.candidates), "dropped": dropped}

    @staticmethod
    def from_dict(data: Mapping[str, Any] | None) -> "Race":
        if not data:
            return Race()
        dropped = {int(n): r for n, r in data["dropped"].items()}
        return Race(tuple(data["candidates"]), dropped, data["seed"], data["searched"])


def is_repeat(trial: FrozenTrial) -> bool:
    return "repeat_of" in trial.user_attrs


def complete(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the search's own complete trials, without repeats."""
    return [t for t in trials if t.state == TrialState.COMPLETE and t.values and not is_repeat(t)]


def repeats(trials: Iterable[FrozenTrial]) -> dict[int, dict[int, FrozenTrial]]:
    """Return origin -> round -> repeat; of a failed one and its retry, the retry."""
    out: dict[int, dict[int, FrozenTrial]] = {}
    for trial in trials:
        if is_repeat(trial):
            out.setdefault(trial.user_attrs["repeat_of"], {})[trial.user_attrs["repeat"]] = trial
    return out


def runs(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Return the ended runs with a metric of each configuration that is complete, the search's own run first."""
    again = repeats(trials)
    ended = (TrialState.COMPLETE, TrialState.PRUNED)
    out = {}
    for trial in complete(trials):
        found = [again.get(trial.number, {})[r] for r in sorted(again.get(trial.number, {}))]
        out[trial.number] = [trial, *(t for t in found if t.state in ended and t.values)]
    return out


def values(runs_of_one: Sequence[FrozenTrial]) -> list[float]:
    """Return the primary metric of each run."""
    return [t.values[0] for t in runs_of_one]


def judged(runs_of_one: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the runs that a configuration is judged by: its repeats, or the search's own run where there are none."""
    return list(runs_of_one[1:] or runs_of_one)


def leader(trials: Sequence[FrozenTrial], race: Race, maximize: bool) -> FrozenTrial | None:
    """Return the complete trial with the best mean of those still in the race, or of all; of equals, the first.

    Once some have run again, the others of the race are not among them.
    """
    found = runs(trials)
    means = {n: statistics.fmean(values(judged(r))) for n, r in found.items()}
    live = [n for n in race.live if n in means]
    among = [n for n in live if len(found[n]) > 1] or live or list(means)
    sign = -1 if maximize else 1
    best = min(among, key=lambda n: (sign * means[n], n), default=None)
    return next((t for t in trials if t.number == best), None)


def out_of_reach(trials: Sequence[FrozenTrial], race: Race, maximize: bool) -> list[int]:
    """Return the candidates whose mean lies below the best one's by more than its interval."""
    first = leader(trials, race, maximize)
    found = {n: r for n, r in runs(trials).items() if n in race.live and len(r) > 1}
    from lorasweep.study import significance  # reads tasks and so loads torch, which `status` does without

    spread = significance.spread(values(r) for r in found.values())
    if first is None or first.number not in found or spread is None:
        return []
    best, sign = values(judged(found[first.number])), 1 if maximize else -1
    gaps = {n: spread.apart(best, values(judged(r))) for n, r in found.items() if n != first.number}
    return [n for n, gap in gaps.items() if gap.distinguishable and sign * gap.value > 0]

"""Runs of one configuration with several seeds: which belong together, which choose it and which are reported.

Runs that differ in train.seed alone are runs of one configuration, however they came about: a sweep over seeds, `add`,
or repeats, which the study queues once the search is over (repeat_rounds.py). A repeat is a trial with the user
attributes `repeat_of` (the trial that it repeats) and `repeat` (1, 2, ...: its round; a round has one seed). Samplers
and pruners do not see repeats.

All runs choose (belief.py). A configuration that was repeated is reported by its repeats alone: the search's own run
was picked for being high, so it is too high on average.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from lorasweep.config.overrides import key_of, without
from lorasweep.config.spec import TrainSpec
from lorasweep.study import belief
from lorasweep.study.belief import Belief, Doubt

AUTO = "auto"
"""Value of search.repeats: until the margin is met or the budget is spent."""
MOST_SEED = 2**32
SEED_KEY = "train.seed"
ENDED_BADLY = (TrialState.FAIL, TrialState.PRUNED)


@dataclass(frozen=True)
class Race:
    """What is repeated; kept with the study, so that `resume` goes on with the same."""

    candidates: tuple[int, ...] = ()
    """The trials that the first round repeats."""
    seed: int = 0
    """Round n trains with seed + n: seeds that the search has not used."""
    searched: int = 0
    """Complete trials of the search when the candidates were chosen."""

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "candidates": list(self.candidates)}

    @staticmethod
    def from_dict(data: Mapping[str, Any] | None) -> "Race":
        if not data:
            return Race()
        return Race(tuple(data["candidates"]), data["seed"], data["searched"])


def is_repeat(trial: FrozenTrial) -> bool:
    return "repeat_of" in trial.user_attrs


def is_searched(trial: FrozenTrial) -> bool:
    """Return whether a trial is one of the search: no repeat, and no baseline."""
    return not is_repeat(trial) and "baseline" not in trial.user_attrs


def complete(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the search's own complete trials, without repeats and baselines."""
    return [t for t in trials if t.state == TrialState.COMPLETE and t.values and is_searched(t)]


def repeats(trials: Iterable[FrozenTrial]) -> dict[int, dict[int, FrozenTrial]]:
    """Return origin -> round -> repeat; of a failed one and its retry, the retry."""
    out: dict[int, dict[int, FrozenTrial]] = {}
    for trial in trials:
        if is_repeat(trial):
            out.setdefault(trial.user_attrs["repeat_of"], {})[trial.user_attrs["repeat"]] = trial
    return out


@lru_cache(maxsize=4096)
def _setting_and_seed(overrides: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
    """Return what trials of one configuration have in common, their overrides without the seed, and the seed."""
    seeds = [o for o in overrides if key_of(o) == SEED_KEY]
    seed = int(seeds[-1].split("=", 1)[1]) if seeds else TrainSpec().seed
    return tuple(sorted(without(overrides, [SEED_KEY]))), seed


def seed_of(trial: FrozenTrial) -> int:
    """Return the seed that a trial was trained with."""
    return _setting_and_seed(tuple(trial.user_attrs.get("overrides", ())))[1]


def _setting(trial: FrozenTrial) -> Any:
    """Return what trials of one configuration have in common."""
    overrides = trial.user_attrs.get("overrides")
    if overrides is None:
        return trial.number
    return _setting_and_seed(tuple(overrides))[0], trial.user_attrs.get("start_from")


def runs(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Return the complete runs of each configuration, by its first trial: the search's own, then its repeats.

    A point that the search drew again trained the same model with the same seed: that is one run, the first.
    """
    found = complete(trials)
    first: dict[Any, int] = {}
    for trial in found:
        first.setdefault(_setting(trial), trial.number)
    out: dict[int, list[FrozenTrial]] = {number: [] for number in first.values()}
    again = repeats(trials)
    for trial in found:
        members = out[first[_setting(trial)]]
        if seed_of(trial) not in map(seed_of, members):
            members.append(trial)
    for trial in found:
        rounds = again.get(trial.number, {})
        ended = [rounds[r] for r in sorted(rounds)]
        out[first[_setting(trial)]] += [t for t in ended if t.state == TrialState.COMPLETE and t.values]
    return out


def failed(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Return the repeats that did not end complete (stopped, diverged, failed), by their configuration's first trial.

    A configuration that fails with another seed is not chosen.
    """
    out: dict[int, list[FrozenTrial]] = {}
    owners = {t.number: number for number, members in runs(trials).items() for t in members}
    for origin, rounds in repeats(trials).items():
        bad = [t for t in rounds.values() if t.state in ENDED_BADLY]
        if bad and origin in owners:
            out.setdefault(owners[origin], []).extend(bad)
    return out


def values(members: Iterable[FrozenTrial]) -> list[float]:
    """Return the primary metric of each run."""
    return [t.values[0] for t in members]


def reported(members: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the runs of a configuration whose mean is reported: its repeats, or all where it has none."""
    return [t for t in members if is_repeat(t)] or list(members)


def by_seed(members: Sequence[FrozenTrial]) -> dict[int, float]:
    """Return seed -> metric of a configuration's runs; of two with one seed, the first."""
    out: dict[int, float] = {}
    for trial in members:
        out.setdefault(seed_of(trial), trial.values[0])
    return out


def beliefs(trials: Sequence[FrozenTrial], maximize: bool) -> Belief | None:
    """Return what all runs say of the configurations that may be chosen; None without a complete trial."""
    bad = failed(trials)
    found = runs(trials)
    allowed = {n: by_seed(members) for n, members in found.items() if n not in bad}
    if not allowed:
        allowed = {n: by_seed(members) for n, members in found.items()}
    return belief.belief(allowed, maximize) if allowed else None


def doubt(trials: Sequence[FrozenTrial], maximize: bool) -> Doubt | None:
    """Return what seeds leave open about the choice; None before they tell anything."""
    best, bad = leader(trials, maximize), failed(trials)
    several = {n: by_seed(found) for n, found in runs(trials).items() if n not in bad}
    several = {n: found for n, found in several.items() if len(found) > 1}
    return belief.doubt(several, best.number, maximize) if best is not None else None


def leader(trials: Sequence[FrozenTrial], maximize: bool) -> FrozenTrial | None:
    """Return the first trial of the configuration that all runs together speak for; of equals, the first.

    One run alone may be luck, and is believed the less for it.
    """
    held = beliefs(trials, maximize)
    return None if held is None else next(t for t in trials if t.number == held.best)

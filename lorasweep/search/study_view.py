"""Views of an Optuna study that samplers and pruners see in the study's place."""

import warnings
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial, TrialState

# --- what samplers and pruners see of a study ------------------------------------------------------------------------


class FirstObjective:
    """A study whose direction is that of objective 0, where Optuna raises for a study of several."""

    def __init__(self, study: optuna.Study) -> None:
        self._seen = study

    @classmethod
    def of(cls, study: optuna.Study) -> Any:
        """Return the view, as Optuna's signatures want a study."""
        return cls(study)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)

    def _get_trials(self, deepcopy: bool, states: Sequence[TrialState] | None, use_cache: bool) -> list[FrozenTrial]:
        return searched(self._seen._get_trials(deepcopy, states, use_cache))

    @property
    def direction(self) -> optuna.study.StudyDirection:
        return self._seen.directions[0]


class Seen:
    """A study in which there are only these trials."""

    def __init__(self, study: optuna.Study, trials: Sequence[FrozenTrial]) -> None:
        self._seen = study
        self._trials = list(trials)

    @classmethod
    def of(cls, study: optuna.Study, trials: Sequence[FrozenTrial]) -> Any:
        """Return the view, as Optuna's signatures want a study."""
        return cls(study, trials)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._seen, name)

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [t for t in self._trials if states is None or t.state in states]

    _get_trials = get_trials


def searched(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that are no repeats of others with another seed, and no baselines."""
    return [t for t in trials if not {"repeat_of", "baseline"} & t.user_attrs.keys()]


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's remarks to ourselves: experimental parts, unlike steps of two trials, a missing greenlet."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)

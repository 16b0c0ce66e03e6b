"""A trial that a person adds to a study."""

from collections.abc import Sequence

from lorasweep.config import compose, trust
from lorasweep.config.overrides import key_of, keys_of, overlaid
from lorasweep.errors import ConfigError
from lorasweep.runner import launchers
from lorasweep.runner.preflight import preflight
from lorasweep.study.meta import Entry
from lorasweep.study.study import Study
from lorasweep.training import workload


def by_hand(study: Study, overrides: Sequence[str], like: int | None, from_weights: bool) -> Entry:
    """Return the queue entry of a trial of overrides, or of a copy of trial `like` that they change.

    With `from_weights` it goes on from that trial's adapter. Raises ConfigError where the trial could not run.
    """
    base = list(study.space.fixed) if like is None else _settings_of(study, like, from_weights)
    line = overlaid(base, overrides)
    spec = compose.compose_trial(line)
    if not study.trusted and not keys_of(overrides) >= {key_of(word) for word in trust.code_of(spec)}:
        trust.refuse_code([spec], study.folder)
    loaded = preflight([spec], not launchers.is_elsewhere(study.meta.launcher))
    metric = spec.task_type.primary or loaded[workload.key(spec)].task.primary
    if metric != study.meta.metric:
        raise ConfigError([f"task_type: the study is ranked by {study.meta.metric}, this trial has {metric}"])
    return Entry(line, study.space.point(spec), start_from=like if from_weights else None, added=True)


def _settings_of(study: Study, number: int, from_weights: bool) -> list[str]:
    """Return the overrides of another trial."""
    origin = study.trial(number)
    if "overrides" not in origin.user_attrs:
        raise ConfigError([f"--like: trial {number} has not been drawn yet"])
    if from_weights and not (study.trial_folder(number) / "adapter").is_dir():
        raise ConfigError([f"--from-weights: trial {number} has left no adapter in {study.trial_folder(number)}"])
    return list(origin.user_attrs["overrides"])

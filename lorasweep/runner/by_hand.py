"""A trial that a person adds to a study."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

from lorasweep.config import compose, trust
from lorasweep.config.overrides import key_of, keys_of, overlaid
from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError, KnownPoint
from lorasweep.models import base_model
from lorasweep.runner import launchers
from lorasweep.runner.model_identity import ModelIdentity
from lorasweep.runner.preflight import preflight
from lorasweep.study import repeats
from lorasweep.study.meta import Entry
from lorasweep.study.study import Study
from lorasweep.tasks import token_lengths
from lorasweep.tasks.metric import A_TOKEN, BITS_PER_BYTE
from lorasweep.training import workload


def by_hand(study: Study, overrides: Sequence[str], like: int | None, from_weights: bool) -> Entry:
    """Return the queue entry of a trial of overrides, or of a copy of trial `like` that they change.

    With `from_weights` it goes on from that trial's adapter. Raises ConfigError where the trial could not run, and
    KnownPoint where it is another one over again.
    """
    base = list(study.space.fixed) if like is None else _settings_of(study, like, from_weights)
    line = overlaid(base, overrides)
    spec = compose.compose_trial(line)
    if not study.trusted and not keys_of(overrides) >= {key_of(word) for word in trust.code_of(spec)}:
        trust.refuse_code([spec], study.folder)
    loaded = preflight([spec], not launchers.is_elsewhere(study.meta.launcher))
    work = loaded[workload.key(spec)]
    metric = spec.task_type.primary or work.task.primary
    by_token = metric in A_TOKEN and BITS_PER_BYTE.name in work.task.metric_names
    if by_token and study.meta.metric == BITS_PER_BYTE.name:
        metric = study.meta.metric
    if metric != study.meta.metric:
        raise ConfigError([f"task_type: the study is ranked by {study.meta.metric}, this trial has {metric}"])
    if by_token and metric in A_TOKEN:
        _refuse_other_tokens(study, work.tokenizer)
    start_from = like if from_weights else None
    _refuse_known(study, spec, start_from, ModelIdentity(lambda s: loaded[workload.key(s)]))
    return Entry(line, study.space.point(spec), start_from=start_from, added=True)


def _refuse_other_tokens(study: Study, tokenizer: Any) -> None:
    """Raise ConfigError where a tokenizer cuts text into other tokens than the study's trials are ranked by."""
    first = base_model.load_tokenizer(study.first_spec().model)
    if token_lengths.rules_of(first) != token_lengths.rules_of(tokenizer):
        raise ConfigError(
            [
                f"model: its tokenizer cuts text into other tokens, and the study is ranked by {study.meta.metric}, "
                f"which counts them; a new study with both models is ranked by {BITS_PER_BYTE.name}"
            ]
        )


def _refuse_known(study: Study, spec: TrialSpec, start_from: int | None, identity: ModelIdentity) -> None:
    """Raise KnownPoint where a trial has this point, with what it came to."""
    twin = study.twin(identity(spec, start_from)) or _waiting(study, spec, start_from, identity)
    if twin is None:
        return
    shown = f"{study.meta.metric} {twin.values[0]:.4f}" if twin.values else twin.state.name
    seed = repeats.seed_of(twin) + 1
    raise KnownPoint(
        f"trial {twin.number} is this point already ({shown}), it is not trained again; with another seed it is: "
        f"train.seed={seed}"
    )


def _waiting(study: Study, spec: TrialSpec, start_from: int | None, identity: ModelIdentity) -> "FrozenTrial | None":
    """Return a trial of the queue that has a point, though nobody has claimed it yet."""
    group = workload.key(spec)
    for trial in study.trials():
        known = trial.user_attrs
        if trial.state.name == "WAITING" and "overrides" in known:
            other = study.spec(known["overrides"])
            if workload.key(other) == group and identity(other, known.get("start_from")) == identity(spec, start_from):
                return trial
    return None


def _settings_of(study: Study, number: int, from_weights: bool) -> list[str]:
    """Return the overrides of another trial."""
    origin = study.trial(number)
    if "overrides" not in origin.user_attrs:
        raise ConfigError([f"--like: trial {number} has not been drawn yet"])
    if from_weights and not (study.trial_folder(number) / "adapter").is_dir():
        raise ConfigError([f"--from-weights: trial {number} has left no adapter in {study.trial_folder(number)}"])
    return list(origin.user_attrs["overrides"])

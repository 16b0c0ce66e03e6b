"""A study's best trial, or the one a person names, and its model: the adapter on its base, ready to answer."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorasweep.config import trust
from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model, quantization
from lorasweep.study.result import TrialResult, result_of
from lorasweep.study.study import Study
from lorasweep.tasks import chat_template, task_state
from lorasweep.tasks.task import Task


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base, in evaluation mode."""

    spec: TrialSpec
    task: Task
    model: Any
    """The peft model."""
    tokenizer: Any

    @property
    def inner(self) -> Any:
        """The base with the adapter in it, as tasks take it."""
        return self.model.base_model.model


def pick(study: Study, number: int | None = None) -> int:
    """Return the trial to use: `number`, else the best. Raises ConfigError where it has left no adapter here."""
    if number is None:
        best = study.best()
        if best is None:
            raise ConfigError([f"{study.meta.name}: no trial is complete; name one with --trial NUMBER"])
        number = best.number
    study.trial(number)
    folder = study.trial_folder(number)
    if not (folder / "adapter" / "adapter_config.json").is_file():
        there = sorted(int(p.parent.name) for p in study.folder.glob("*/adapter") if p.parent.name.isdigit())
        kept = f"; trials with one: {', '.join(map(str, there))}" if there else ""
        raise ConfigError(
            [
                f"trial {number} of {study.meta.name} has no adapter in {folder}{kept}; name another with --trial "
                "NUMBER, or run it again (its rerun line is in result.json)"
            ]
        )
    return number


def load(folder: Path, *, ordinary: bool = False, trusted: bool = False, **task_keys: Any) -> Loaded:
    """Return the adapter in a trial's folder on its base, on whatever device is here.

    With `ordinary`, layers of a quantised base become ordinary ones of the very weights that they stand for: an update
    can go into those unrounded. `trusted` lets code run that comes with the base. `task_keys` change keys of task_type.
    Raises ConfigError where base, adapter or settings are gone, or ask for such code.
    """
    found = trust.without_functions(task_state.settings(folder))
    if not trusted:
        trust.refuse_code([found], folder)
    attention = found.model.attn_implementation.replace("flash_attention_2", "auto")  # may not run here
    trial = replace(
        found,
        model=replace(found.model, attn_implementation=attention),
        train=replace(found.train, device="auto"),
    )
    task = task_state.task_of(folder, trial, **task_keys)
    tokenizer = base_model.load_tokenizer(trial.model)
    chat_template.give_template(tokenizer, trial.data.chat_template)
    base = base_model.load(trial.model, trial.train, task, tokenizer)
    if ordinary and base.small:
        quantization.read_back(base.model)
        base = replace(base, small=())
    peft_model = adapter.reload(folder / "adapter", base, trial.lora, trial.task_type)
    return Loaded(trial, task, peft_model, tokenizer)


def result(study: Study, number: int) -> TrialResult:
    """Return what a trial came to, as far as is known here."""
    return result_of(study.trial(number), study.trial_folder(number))

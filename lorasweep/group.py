"""What trials can share: base model, task, data set, tokenised once. And every problem of it before training."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasweep import data, device, lora_config, model, quant, recompute, tasks, tokens
from lorasweep.engine import Prepared
from lorasweep.errors import ConfigError
from lorasweep.spec import TrialSpec
from lorasweep.tasks import Example, Task


@dataclass
class Workload:
    """Task, data and tokens of a group of trials; all a trial needs but the base model."""

    task: Task
    data: data.Data
    tokenizer: Any
    examples: dict[str, Sequence[Example]]
    place: Path
    """Where the tokens are kept, or may be."""
    told: dict[str, Any] | None = None
    """What encoding told the task, where the tokens were made now."""

    def keep(self) -> "Workload":
        """Write the tokens down where they were made now, and go on with those on disk; return this workload."""
        if self.told is not None and tokens.write(self.place, self.examples, self.told):
            found = tokens.read(self.place)
            self.examples = found[0] if found else self.examples
        self.told = None
        return self

    def prepared(self) -> Prepared:
        return Prepared(self.examples["train"], self.examples["eval"], self.tokenizer.pad_token_id)


SECTIONS = ("model", "task_type", "data")
TRAIN = ("device", "precision", "deterministic")
"""Keys of train that a base is loaded with."""


def varies(swept: Sequence[str]) -> bool:
    """Tell whether trials that differ in these keys may need different bases or data."""
    return any(k.split(".")[0] in SECTIONS or k in [f"train.{t}" for t in TRAIN] for k in swept)


def key(spec: TrialSpec) -> str:
    """Return a string that is equal for trials that can share a base and its data."""
    train = {k: v for k, v in asdict(spec.train).items() if k in TRAIN}
    return json.dumps([asdict(spec.model), asdict(spec.task_type), asdict(spec.data), train], sort_keys=True)


def workload(spec: TrialSpec) -> Workload:
    """Return the group's data as tokens, from disk where they are there.

    Raises ConfigError with all that is wrong with the data.
    """
    task = tasks.make(spec.task_type)
    rows = data.load(spec.data, task.columns(spec.data), task.name)
    problems = task.fit(rows)
    if problems:
        raise ConfigError(problems)
    tokenizer = model.load_tokenizer(spec.model)
    place, told = tokens.place(spec, task, tokenizer, rows.fingerprint), None
    found = tokens.read(place)
    if found is not None:
        examples = found[0]
        tokens.tell(task, tokenizer, found[1])
    else:
        examples, told = tokens.encoded(task, rows.splits, tokenizer, spec.data)
    empty = [
        f"data.max_tokens: nothing is left to learn in the {split} split: every example's supervised part lies beyond "
        f"{spec.data.max_tokens} tokens"
        for split, made in examples.items()
        if not made
    ]
    if empty:
        raise ConfigError(empty)
    return Workload(task, rows, tokenizer, examples, place, told)


def preflight(specs: Sequence[TrialSpec], here: bool = True) -> dict[str, Workload]:
    """Return the workload of each group. Raises ConfigError with the problems of all trials before anything trains.

    `here` tells whether they will train on machines like this one: then it needs to have what they ask for.
    """
    problems: list[str] = []
    loaded: dict[str, Workload] = {}
    bases: dict[str, model.Base] = {}
    failed: set[str] = set()
    for spec in specs:
        group = key(spec)
        if group in failed:
            continue
        try:
            problems += _lacking(spec) if here else []
            if group not in loaded:
                loaded[group] = workload(spec)
                bases[group] = model.skeleton(spec.model, loaded[group].task, loaded[group].tokenizer)
            problems += lora_config.problems(spec.lora, spec.task_type, bases[group])
            if here:
                problems += lora_config.misread(spec.lora, spec.task_type, bases[group], device.device_of(spec.train))
            problems += recompute.problems(spec, bases[group].model)
            problems += metric_problems(spec, loaded[group].task)
        except ConfigError as error:
            failed.add(group)
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return loaded


def _lacking(spec: TrialSpec) -> list[str]:
    """Return what this machine lacks of what a trial asks for. Raises ConfigError where its whole group cannot be."""
    there = device.device_of(spec.train)
    if spec.train.precision == "bf16" or spec.model.attn_implementation == "flash_attention_2":  # to ask begins CUDA
        device.attention(spec.model, there, device.dtype_of(spec.train, there))
    return quant.lacking(spec, there)


def metric_problems(spec: TrialSpec, task: Task) -> list[str]:
    """Return a problem where task_type.primary names no metric of the task."""
    primary = spec.task_type.primary
    if primary is None or primary in task.metric_names:
        return []
    return [f"task_type.primary: {task.name} has {', '.join(task.metric_names)}, got '{primary}'"]

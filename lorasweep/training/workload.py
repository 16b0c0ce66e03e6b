"""What trials can share: base model, task, data set, tokenised once. And every problem of it before training."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lorasweep import tasks
from lorasweep.config.fields import Affects
from lorasweep.config.spec import DataSpec, TrialSpec, keys_affecting
from lorasweep.data import dataset
from lorasweep.errors import ConfigError
from lorasweep.hardware import device
from lorasweep.memory import estimate
from lorasweep.models import base_model, pooling, token_limits
from lorasweep.tasks import chat_template, token_cache, token_lengths
from lorasweep.tasks.task import Example, Task

MET_ROWS = 32
"""About how many training texts a task may see a fresh model answer."""


@dataclass
class Prepared:
    """A data set as a task's examples, ready for any trial that shares the base."""

    train: Sequence[Example]
    eval: Sequence[Example]
    pad_id: int

    @property
    def examples(self) -> estimate.Examples:
        return {"train": self.train, "eval": self.eval}


@dataclass(frozen=True)
class Pace:
    """How fast trials of a kind go on this machine, timed before a study begins."""

    start_s: float
    """To put an adapter on the base, and what is done once before the first step."""
    load_s: float
    """To load the base."""
    train_s: float
    """A training token."""
    step_tokens: float
    """Tokens of a step."""
    overhead: float
    """What a pass costs beside its tokens, in tokens; 0 where trials do not share passes."""
    eval_s: float
    """An evaluated row."""


@dataclass
class Workload:
    """Task, data and tokens of a group of trials; all a trial needs but the base model."""

    task: Task
    data: dataset.Data
    tokenizer: Any
    examples: dict[str, Sequence[Example]]
    place: Path
    """Where the tokens are kept, or may be."""
    data_spec: DataSpec
    """The settings of the data, with what they left open filled in, cut to what the model has positions for."""
    skeleton: base_model.Base
    """The model without its weights."""
    notes: tuple[str, ...] = ()
    """What a person may want to know of how the model is used for these data."""
    base: base_model.Base | None = None
    """The model as the pre-flight loaded it, for who trains in this process."""
    paces: dict[str, Pace] = field(default_factory=dict)
    """By kind of trial, as far as the rehearsal has timed them."""
    told: dict[str, Any] | None = None
    """What encoding told the task, where the tokens were made now."""

    def keep(self) -> "Workload":
        """Write the tokens down where they were made now, and go on with those on disk; return this workload."""
        if self.told is not None and token_cache.write(self.place, self.examples, self.told, self.task.held):
            found = token_cache.read(self.place, self.task.held)
            self.examples = found[0] if found else self.examples
        self.told = None
        return self

    def take_base(self, spec: TrialSpec) -> base_model.Base:
        """Return the model that the pre-flight has loaded, the first time; else load it."""
        base, self.base = self.base, None
        where = device.device_of(spec.train)
        if base is None or not _is_on(base, where):
            return self.loaded_base(spec)
        device.set_up(spec.train, where)
        return base

    def loaded_base(self, spec: TrialSpec) -> base_model.Base:
        """Return the model, freshly loaded. Raises ConfigError where it cannot be loaded."""
        base = base_model.load(spec.model, spec.train, self.task, self.tokenizer)
        rows = self.examples["train"]
        some = [rows[i] for i in range(0, len(rows), max(1, len(rows) // MET_ROWS))]
        with torch.no_grad():
            base.starts = self.task.meet(base.model, some, self.tokenizer.pad_token_id)
        return base

    def prepared(self) -> Prepared:
        return Prepared(self.examples["train"], self.examples["eval"], self.tokenizer.pad_token_id)


def _is_on(base: base_model.Base, where: torch.device) -> bool:
    """Tell whether a base lies where this process computes: of several GPUs, on its own."""
    there = base.model.device
    return there.type == where.type and (there.type != "cuda" or there.index in (None, torch.cuda.current_device()))


def varies(swept: Sequence[str]) -> bool:
    """Tell whether trials that differ in these keys, or groups of keys, may need different bases or data."""
    keys = keys_affecting(Affects.BASE)
    groups = {key.partition(".")[0] for key in keys}
    return any(key in groups or key in keys for key in swept)


def key(spec: TrialSpec) -> str:
    """Return a string that is equal for trials that can share a base and its data."""
    return json.dumps(spec.affecting(Affects.BASE), sort_keys=True)


def workload(spec: TrialSpec) -> Workload:
    """Return the group's data as tokens, from disk where they are there.

    Raises ConfigError with all that is wrong with the data.
    """
    task = tasks.make(spec.task_type)
    rows = load_rows(spec, task)
    problems = task.fit(rows)
    if problems:
        raise ConfigError(problems)
    tokenizer = base_model.load_tokenizer(spec.model)
    template = chat_template.give_template(tokenizer, spec.data.chat_template)
    base_model.take_order_of_head(spec.model, task)
    skeleton = base_model.skeleton(spec.model, task, tokenizer)
    prefixes, said = _prefixes(spec, task)
    data, notes = token_lengths.settle_max_tokens(
        task, rows.splits["train"], tokenizer, replace(spec.data, **rows.found, **prefixes)
    )
    rows = replace(rows, notes=(*rows.notes, *said, *notes))
    data, notes = token_limits.fitted(data, skeleton.model)
    task.found = {**rows.found, **prefixes, "max_tokens": data.max_tokens, "max_target_tokens": data.max_target_tokens}
    if template is not None:
        task.found["chat_template"] = template
    for split in ("eval", "test"):
        undefined = task.undefined(rows, split)
        task.notes += [f"{metric} has no value on {split}: {reason}" for metric, reason in undefined.items()]
    spec = replace(spec, data=data)
    place, told = token_cache.place(spec, task, tokenizer, rows.fingerprint), None
    found = token_cache.read(place, task.held)
    if found is not None:
        examples = found[0]
        token_cache.tell(task, tokenizer, found[1])
    else:
        examples, told = token_cache.encoded(task, rows.splits, tokenizer, data)
    problems = [
        f"data.max_tokens: nothing is left to learn in the {split} split: every example's supervised part lies beyond "
        f"{data.max_tokens} tokens"
        for split, made in examples.items()
        if not made
    ]
    problems += token_limits.id_problems(skeleton.model, tokenizer, examples)
    for made in examples.values():
        problems += token_limits.generation_problems(spec.task_type, skeleton.model, made)
    if problems:
        raise ConfigError(problems)
    task.records = rows.splits
    return Workload(task, rows, tokenizer, examples, place, data, skeleton, (*skeleton.notes, *notes), told=told)


def _prefixes(spec: TrialSpec, task: Task) -> tuple[dict[str, Any], list[str]]:
    """Return the texts that a sentence-transformers checkpoint puts before others, and notes on how its vectors are
    made; nothing for a task that makes none.
    """
    if not task.pools:
        return {}, []
    place = base_model.source(spec.model)
    found = task.prefixes(spec.data, pooling.prompts(spec.model, place))
    notes = [f"data.{key}={text!r}, by the checkpoint's prompts" for key, text in found.items() if text]
    notes += [f"model.pooling={task.pooling}, by the checkpoint"] if task.pooling != "mean" else []
    return found, [*notes, *pooling.left_out(spec.model, place)]


def load_rows(spec: TrialSpec, task: Task) -> dataset.Data:
    """Return the rows of a trial's data; the tokenizer is loaded where running text has to be cut."""

    tokenizer = cache(lambda: base_model.load_tokenizer(spec.model))

    def count(texts: Sequence[str]) -> list[int]:
        return [len(ids) for ids in tokenizer()(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]

    name = json.dumps([spec.model.tokenizer, spec.model.pretrained, spec.model.revision])
    columns = task.columns(spec.data) | ({"group": spec.data.group_column} if spec.data.group_column else {})
    return dataset.load(spec.data, columns, task.builtin, spec.task_type.problem_type, count, name)

"""The first training batches as model inputs, for initialisations that look at data."""

import inspect
import itertools
from dataclasses import replace

import torch
from torch import Tensor

from lorasweep.config.spec import TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.models.base_model import Base
from lorasweep.tasks.batches import epochs
from lorasweep.tasks.task import Task
from lorasweep.training.workload import Prepared

LOOK_AT = 32
"""Training batches, or as many examples in larger ones, that a data-driven initialisation sees."""


def first_inputs(spec: TrialSpec, base: Base, task: Task, prepared: Prepared) -> list[dict[str, Tensor]]:
    """Return the model inputs of the trial's first examples, on the base's device.

    A batch holds as many examples as the initialisation has to see at once: a pooler sees one row an example, and
    peft's eva waits for ever for a module that sees fewer. Raises ConfigError where there are too few examples.
    """
    train, examples = spec.train, prepared.train
    init = spec.lora.init
    least = init.sees(spec.lora)
    if len(examples) < least:
        raise ConfigError(
            [
                f"lora.init_lora_weights: {init.name} needs {init.sees_rule} = {least} training examples, got "
                f"{len(examples)}"
            ]
        )
    size = max(train.batch_size, least)
    count = max(2, LOOK_AT * train.batch_size // size)
    whole = (b for b in epochs(examples, size, train.seed) if len(b) >= least)
    device = next(base.model.parameters()).device
    batches = [task.collate([b], prepared.pad_id, device) for b in itertools.islice(whole, count)]
    if base.model.config.is_encoder_decoder:  # makes its decoder's inputs from the labels
        batches = [replace(b, inputs={**b.inputs, "labels": b.labels}) for b in batches]
    known = inspect.signature(base.model.forward).parameters
    read = []
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.inputs.items() if name in known}
        read.append({"attention_mask": torch.ones_like(batch.inputs["input_ids"])} | inputs)
    return read

"""What is checked of all trials before the first one begins."""

from collections.abc import Sequence

from lorasweep.config.spec import TrialSpec
from lorasweep.data.dataset import Data
from lorasweep.errors import ConfigError
from lorasweep.hardware import device
from lorasweep.lora import peft_config
from lorasweep.models import base_model, quantization
from lorasweep.packing import gradient_checkpointing
from lorasweep.tasks.task import Task
from lorasweep.training import workload
from lorasweep.training.workload import Workload


def preflight(specs: Sequence[TrialSpec], here: bool = True) -> dict[str, Workload]:
    """Return the workload of each group. Raises ConfigError with the problems of all trials before anything trains.

    `here` tells whether they will train on machines like this one: then it needs to have what they ask for.
    """
    problems: list[str] = []
    loaded: dict[str, Workload] = {}
    bases: dict[str, base_model.Base] = {}
    failed: set[str] = set()
    for spec in specs:
        group = workload.key(spec)
        if group in failed:
            continue
        try:
            problems += _lacking(spec) if here else []
            if group not in loaded:
                loaded[group] = workload.workload(spec)
                bases[group] = base_model.skeleton(spec.model, loaded[group].task, loaded[group].tokenizer)
            problems += peft_config.problems(spec.lora, spec.task_type, bases[group])
            if here:
                problems += peft_config.misread(spec.lora, spec.task_type, bases[group], device.device_of(spec.train))
            problems += gradient_checkpointing.problems(spec, bases[group].model)
            problems += metric_problems(spec, loaded[group].task, loaded[group].data)
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
    return quantization.lacking(spec, there)


def metric_problems(spec: TrialSpec, task: Task, data: Data) -> list[str]:
    """Return a problem where task_type.primary names no metric of the task, or one that has no value on eval."""
    primary = spec.task_type.primary or task.primary
    if primary not in task.metric_names:
        return [f"task_type.primary: {task.name} has {', '.join(task.metric_names)}, got '{primary}'"]
    reason = task.undefined(data, "eval").get(primary)
    if reason is None:
        return []
    others = ", ".join(name for name in task.metric_names if name not in task.undefined(data, "eval"))
    return [
        f"data.eval_split: {primary} has no value on eval ({reason}); give a split that has some, or rank by another "
        f"metric, task_type.primary={others.split(', ')[0]} (of {others})"
    ]

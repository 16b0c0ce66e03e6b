"""What is checked of all trials before the first one begins."""

from collections.abc import Mapping, Sequence

from lorasweep.config.spec import TrialSpec
from lorasweep.data.dataset import Data
from lorasweep.errors import ConfigError
from lorasweep.hardware import device
from lorasweep.lora import peft_config
from lorasweep.memory import estimate
from lorasweep.models import base_model, fetch, quantization
from lorasweep.packing import gradient_checkpointing
from lorasweep.runner import rehearsal
from lorasweep.tasks.task import Task
from lorasweep.training import workload
from lorasweep.training.workload import Workload


def preflight(specs: Sequence[TrialSpec], here: bool = True, keep: bool = False) -> dict[str, Workload]:
    """Return the workload of each group. Raises ConfigError with the problems of all trials before anything trains.

    `here` tells whether they will train on machines like this one: then it needs to have what they ask for, and each
    kind of trial is tried on the real model. `keep` leaves that model to who trains in this process.
    """
    problems: list[str] = []
    loaded: dict[str, Workload] = {}
    failed: set[str] = set()
    for spec in specs:
        group = workload.key(spec)
        if group in failed:
            continue
        try:
            problems += _lacking(spec) if here else []
            if group not in loaded:
                loaded[group] = _workload(spec)
            problems += _static_problems(spec, loaded[group], here)
        except ConfigError as error:
            failed.add(group)
            problems += error.problems
    if here and not problems:
        problems = rehearsal.rehearse([s for s in specs if not _is_hopeless(s, loaded)], loaded, keep)
    if problems:
        raise ConfigError(problems)
    return loaded


def _is_hopeless(spec: TrialSpec, loaded: Mapping[str, Workload]) -> bool:
    """Return whether search.max_memory_gib rules a point out: it will never be loaded, so it is not tried either."""
    if spec.search.max_memory_gib is None:
        return False
    work = loaded[workload.key(spec)]
    return bool(estimate.hopeless(spec, work.task, work.tokenizer, work.examples))


def _workload(spec: TrialSpec) -> Workload:
    """Return the group's workload. Raises ConfigError with what is wrong with the files of its model, and its data."""
    for name in (spec.model.pretrained, spec.model.decoder or ""):
        if name.startswith("fetched:"):
            fetch.offer(name.removeprefix("fetched:"), spec.model.fetch)
    broken = base_model.file_problems(spec.model)
    try:
        work = workload.workload(spec)
    except ConfigError as error:
        known = "model." if broken else "-"  # what breaks on broken files is said already
        raise ConfigError([*broken, *(p for p in error.problems if not p.startswith(known))]) from error
    if broken:
        raise ConfigError(broken)
    return work


def _static_problems(spec: TrialSpec, work: Workload, here: bool) -> list[str]:
    """Return what is wrong with a trial as far as names and shapes tell."""
    base = work.skeleton
    there = device.device_of(spec.train) if here else None
    problems = peft_config.problems(spec.lora, spec.task_type, base, there)
    problems += gradient_checkpointing.problems(spec, base.model)
    if spec.lora.init_lora_weights == "eva" and len(work.examples["train"]) < spec.lora.eva_directions:
        problems.append(
            f"lora.init_lora_weights: eva needs r * eva_rho = {spec.lora.eva_directions} training examples, got "
            f"{len(work.examples['train'])}"
        )
    return problems + metric_problems(spec, work.task, work.data)


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

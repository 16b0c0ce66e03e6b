"""What is checked of all trials before the first one begins."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from lorasweep.config.overrides import key_of
from lorasweep.config.spec import TrialSpec
from lorasweep.data import dataset
from lorasweep.data.dataset import Data
from lorasweep.errors import ConfigError
from lorasweep.hardware import device
from lorasweep.lora import adapter, peft_config
from lorasweep.memory import estimate
from lorasweep.models import base_model, fetch, quantization
from lorasweep.packing import gradient_checkpointing
from lorasweep.runner import rehearsal
from lorasweep.runner.findings import Findings
from lorasweep.runner.model_identity import ModelIdentity
from lorasweep.tasks import token_lengths
from lorasweep.tasks.metric import A_TOKEN, BITS_PER_BYTE
from lorasweep.tasks.task import Task
from lorasweep.training import learning_rate, workload
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
    fetch.offer_all(spec.model)
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
    if here and spec.lora.full and not problems:
        problems += _no_room_for_all(spec, work)
    return problems + metric_problems(spec, work.task, work.data)


def _no_room_for_all(spec: TrialSpec, work: Workload) -> list[str]:
    """Return a problem where full fine-tuning needs more memory than there is."""
    try:
        needed = estimate.estimate(spec, work.task, work.tokenizer, work.examples).gib
    except estimate.UNCOUNTED:
        return []
    free = estimate.free_gib(device.device_of(spec.train))
    if needed <= free:
        return []
    asked = "search.baselines: full" if spec.search.baselines else "lora.full"
    return [
        f"{asked}: to train every weight needs about {needed:.1f} GiB, and {estimate.told(spec.train)}; leave it out, "
        "or set train.micro_batch_size or train.gradient_checkpointing=true"
    ]


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


# --- what is known of the points then --------------------------------------------------------------------------------


def findings(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload], swept: Sequence[str], here: bool) -> Findings:
    """Return what study.json and the screen will tell. Raises ConfigError where the points make no study."""
    never = _never(specs, loaded, swept) if here else []
    first = loaded[workload.key(specs[0])].task
    asked = _shared_metric(specs, loaded)
    metric = first.metric(asked)
    by_bits = metric.name in A_TOKEN and BITS_PER_BYTE.name in first.metric_names and _cut_unlike(specs, loaded)
    if by_bits:
        metric = first.metric(BITS_PER_BYTE.name)
        _check_units(specs[0], asked)
    data = _data(specs, loaded)
    notes = [*_notes(specs, loaded), *_rates(specs, loaded)]
    if by_bits:
        notes.append(
            f"the trials' tokenizers cut text into unlike tokens, so that {asked} does not compare: they are ranked "
            f"by {metric.name}, what the supervised text costs in bits a UTF-8 byte"
        )
    return Findings(
        metric=metric.name,
        maximize=metric.maximize,
        unit=metric.unit,
        bounds=metric.bounds,
        data=data,
        adapter_bytes=_trained_bytes([s for s in specs if not s.lora.full], loaded),
        full_bytes=_trained_bytes([s for s in specs if s.lora.full], loaded),
        never=never,
        notes=notes,
        first_alike=_first_alike(specs, loaded),
    )


def _trained_bytes(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> int:
    """Return the size of what the trial of the highest rank trains and saves; 0 without a trial."""
    if not specs:
        return 0
    spec = max(specs, key=lambda s: s.lora.r)
    plain = replace(spec.lora, init_lora_weights=True)
    attached = adapter.attach(loaded[workload.key(spec)].skeleton, plain, spec.task_type, spec.train.seed)
    try:
        counts = adapter.counts(attached)
    finally:
        adapter.detach(attached)
    return 4 * (counts.trainable + (counts.lora if spec.lora.changes_base else 0))


def _first_alike(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[int]:
    identity = ModelIdentity(lambda spec: loaded[workload.key(spec)])
    first: dict[str, int] = {}
    return [first.setdefault(identity(spec), number) for number, spec in enumerate(specs)]


def _shared_metric(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> str:
    """Return the metric that ranks all trials. Raises ConfigError where they have different ones."""
    metrics = list(dict.fromkeys(s.task_type.primary or loaded[workload.key(s)].task.primary for s in specs))
    if len(metrics) > 1:
        raise ConfigError(
            [f"task_type: trials of one study are ranked by one metric, got {', '.join(metrics)}; sweep them apart"]
        )
    return metrics[0]


def _cut_unlike(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> bool:
    """Return whether the trials' tokenizers cut a text into different tokens."""
    tokenizers: dict[Any, Any] = {}
    for spec in specs:
        name = (spec.model.tokenizer, spec.model.pretrained, spec.model.revision)
        tokenizers.setdefault(name, loaded[workload.key(spec)].tokenizer)
    return len(tokenizers) > 1 and len(set(map(token_lengths.rules_of, tokenizers.values()))) > 1


def _check_units(spec: TrialSpec, asked: str) -> None:
    """Raises ConfigError where a key is about a loss a token, which does not rank the trials."""
    keys = {
        "search.target": spec.search.target,
        "search.margin": spec.search.margin,
        "search.direction": None if spec.search.direction == "auto" else spec.search.direction,
    }
    wrong = {key: value for key, value in keys.items() if value is not None}
    problems = [
        f"{key}: is about {asked}, got {value}, and trials whose tokenizers differ are ranked by {BITS_PER_BYTE.name}; "
        f"give task_type.primary={BITS_PER_BYTE.name} and a value for that"
        for key, value in wrong.items()
    ]
    if problems:
        raise ConfigError(problems)


def _never(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload], swept: Sequence[str]) -> list[str]:
    """Return a line for each point that search.max_memory_gib rules out. Raises ConfigError where it leaves none."""
    lines = []
    for number, spec in enumerate(specs):
        work = loaded[workload.key(spec)]
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            point = " ".join(o for o in spec.overrides if key_of(o) in swept) or "as it is"
            lines.append(f"point {number} ({point}) {why}")
    if lines and len(lines) == len(specs):
        raise ConfigError([f"search.max_memory_gib: no trial is left; {line}" for line in lines])
    return lines


def _data(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[dict[str, Any]]:
    """Return what study.json holds of each data set, so that a change of a file is seen when the study goes on."""
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        fingerprint = loaded[workload.key(spec)].data.fingerprint
        seen = {"fingerprint": fingerprint, "files": dataset.files_seen(spec.data)}
        found.setdefault(json.dumps(asdict(spec.data)), {"overrides": list(spec.overrides), **seen})
    return list({entry["fingerprint"]: entry for entry in reversed(found.values())}.values())


def _notes(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[str]:
    """Return what a person may want to know of how each model is used and what is adapted of it, each sentence once."""
    found: dict[str, None] = {}
    for group, work in loaded.items():
        different = {str(s.lora.target_modules): s for s in specs if workload.key(s) == group}
        found.update(dict.fromkeys([*work.notes, *work.task.notes]))
        for spec in different.values():
            found.update(dict.fromkeys(peft_config.notes(spec.lora, spec.task_type, work.skeleton)))
    return list(found)


def _rates(specs: Sequence[TrialSpec], loaded: Mapping[str, Workload]) -> list[str]:
    """Return what train.learning_rate=auto came to over the points; nothing where all rates are given."""
    works = [(s, loaded[workload.key(s)]) for s in specs if s.train.learning_rate == "auto"]
    rates = {learning_rate.peak(spec, work.task, work.skeleton.model) for spec, work in works}
    span = " to ".join(f"{rate:.2g}" for rate in sorted({min(rates), max(rates)})) if rates else ""
    return [f"train.learning_rate=auto came to {span}"] if rates else []

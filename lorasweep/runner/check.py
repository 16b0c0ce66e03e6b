"""What would happen: modules matched, parameters, memory, tokens, one example. Nothing trains.

A model in a local folder is loaded, for what its checkpoint lacks; one that is large or on a hub stays on the meta
device, without weights.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lorasweep import console
from lorasweep.config.spec import TrialSpec
from lorasweep.hardware import device, matmul_peak
from lorasweep.lora import adapter, peft_config
from lorasweep.memory import estimate
from lorasweep.models import base_model, quantization, target_modules
from lorasweep.packing import packed_pass, pass_cost
from lorasweep.tasks.batches import step_counts
from lorasweep.tasks.task import Example
from lorasweep.training import learning_rate, workload

LOADED_BYTES = 2**30
"""Local checkpoints up to this size are loaded; larger ones stay on the meta device."""

SHOWN_LABELS = 12


@dataclass(frozen=True)
class Plan:
    """The numbers of one trial, known before it trains."""

    matched: dict[str, int]
    """Last part of the adapted modules' names -> how many."""
    unmatched: dict[str, int]
    """The same of linear layers that are not adapted."""
    layers: dict[str, list[int]]
    """Module list -> the layers of it that have adapted modules, as layers_to_transform counts them."""
    missing: tuple[str, ...]
    """Modules that the checkpoint lacks."""
    small: int
    """How many linear layers are quantised."""
    whole: list[str]
    """Modules trained in full."""
    alone: str
    """Why it cannot share passes with other trials, if so."""
    counts: adapter.Counts
    adapter_mb: float
    """Size of the file, 10^6 bytes."""
    memory: estimate.Estimate
    """Of the trial by itself."""
    flops: float
    """Floating-point operations an optimiser step, of the matrix products."""
    steps: int
    steps_per_epoch: int


def plan(spec: TrialSpec, work: workload.Workload) -> Plan:
    """Return the plan of one trial. The adapter is put on with a plain initialisation: shapes are the same."""
    base = _base(spec, work)
    linear = {n: m for n, m in base.model.named_modules() if isinstance(m, base_model.LINEAR)}
    plain = replace(spec.lora, init_lora_weights=True)
    attached = adapter.attach(base, plain, spec.task_type, spec.train.seed)
    inner = attached.peft_model.base_model.model
    adapted = [n for n, m in inner.named_modules() if isinstance(m, adapter.LoraLayer)]
    whole = adapter.saved_modules(attached.peft_model)
    counts = adapter.counts(attached)
    saved = counts.trainable + (counts.lora if spec.lora.changes_base else 0)
    per_epoch, steps = step_counts(spec.train, len(work.examples["train"]))
    adapter.detach(attached)
    return Plan(
        matched=dict(Counter(n.rpartition(".")[2] for n in adapted)),
        unmatched=dict(Counter(n.rpartition(".")[2] for n in linear if n not in adapted and n not in whole)),
        layers=target_modules.layers_of(adapted, spec.lora.layers_pattern),
        missing=base.missing,
        small=len(base.small),
        whole=whole,
        alone=packed_pass.alone_reason(spec),
        counts=counts,
        adapter_mb=saved * 4 / 1e6,
        memory=_memory(spec, work, base.missing),
        flops=_flops(spec, work, counts, linear),
        steps=steps,
        steps_per_epoch=per_epoch,
    )


def _base(spec: TrialSpec, work: workload.Workload) -> base_model.Base:
    if work.base is not None:
        return work.base
    where = Path(base_model.source(spec.model))
    size = sum(p.stat().st_size for p in where.glob("*.safetensors")) if where.is_dir() else 0
    if 0 < size <= LOADED_BYTES:
        return base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    return base_model.skeleton(spec.model, work.task, work.tokenizer)


def _memory(spec: TrialSpec, work: workload.Workload, missing: tuple[str, ...], slots: int = 1) -> estimate.Estimate:
    return estimate.estimate(spec, work.task, work.tokenizer, work.examples, slots=slots, missing=missing)


def _phases(found: estimate.Estimate) -> str:
    return ", ".join(f"{name} {gib:.2f}" for name, gib in found.phases.items())


def _free(spec: TrialSpec) -> str:
    there = device.device_of(spec.train)
    return f"{estimate.free_gib(there):.1f} GiB are free on the {there.type}"


def _shared(spec: TrialSpec, work: workload.Workload, found: Plan) -> str:
    """Say what trials need that share their passes, and what each of them adds; or why they share none."""
    train = spec.train
    if found.alone:
        return f"one trial a pass: {found.alone}"
    slots = train.fixed_slots or (1 if train.deterministic else pass_cost.MOST)
    if slots == 1:
        return f"one trial a pass ({'train.slots=1' if train.fixed_slots else 'train.deterministic=true'})"
    one, all_ = found.memory, _memory(spec, work, found.missing, slots)
    each = {name: (all_.parts[name] - one.parts[name]) / (slots - 1) for name in estimate.PARTS}
    most = "" if train.fixed_slots else "at most "
    return (
        f"{all_.gib:.2f} GiB with {most}{slots} trials in one pass ({_phases(all_)}); each beyond the first adds "
        f"{sum(each.values()):.3f} to training: {_parts(each)}"
    )


def _parts(parts: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {gib:.3f}" for name, gib in parts.items() if gib >= 5e-4)


def _kept(spec: TrialSpec, found: estimate.Estimate) -> str:
    """Say how much of the machine's memory the states of layers take that no trial changes."""
    if not found.kept:
        return "no states of frozen layers"
    most = f"train.prefix_cache_gib={spec.train.prefix_cache_gib:g}"
    counted = "counted above" if found.parts["kept states"] else "beside the device's, which is counted above"
    return f"{found.kept:.3f} GiB of frozen layers' states in the machine's memory ({counted}), at most {most}"


def _flops(spec: TrialSpec, work: workload.Workload, counts: adapter.Counts, linear: Mapping[str, nn.Module]) -> float:
    """Return 4 operations a frozen weight and token (forward, and back to the input) and 6 a trained one."""
    examples = work.examples["train"]
    tokens = spec.train.batch_size * sum(map(len, examples)) / len(examples)
    frozen = sum(_size(m) for m in linear.values())
    return tokens * (4 * frozen + 6 * counts.lora)


def _size(module: nn.Module) -> int:
    """Return how many numbers a linear layer's weight stands for."""
    return quantization.size(module) if quantization.is_linear(module) else module.get_parameter("weight").numel()


def _precision(spec: TrialSpec, small: int) -> str:
    """Say how the base is kept and multiplied, and what trains."""
    there = device.device_of(spec.train)
    dtype = str(device.dtype_of(spec.train, there)).removeprefix("torch.")
    kind = spec.model.quantization
    kept = f"{small} linear layers in {quantization.BITS[kind]} bits ({kind}), the rest in " if small else ""
    twice = ", double quantisation" if kind == "nf4" and spec.model.double_quant else ""
    slow = matmul_peak.slow(there, device.dtype_of(spec.train, there))
    told = f" ({slow})" if slow else ""
    return f"base {kept}{dtype}{twice}, products in {dtype} on the {there.type}{told}; what trains in float32"


# --- what a person reads ---------------------------------------------------------------------------------------------


def show(spec: TrialSpec, work: workload.Workload) -> None:
    """Print everything about one trial, a line a fact."""
    found = plan(spec, work)
    counts, train = found.counts, spec.train
    notes = [*work.data.notes, *work.notes, *work.task.notes]
    notes += peft_config.notes(spec.lora, spec.task_type, work.skeleton)
    micro = train.rows
    lines = {
        "model": f"{spec.model.pretrained}, {counts.total - counts.trainable:,} parameters",
        "precision": _precision(spec, found.small),
        "task": f"{work.task.name}, ranked by {spec.task_type.primary or work.task.primary}",
        "data": f"{work.data.name}, fingerprint {work.data.fingerprint[:12]}, "
        + ", ".join(f"{k} {len(v):,}" for k, v in work.data.splits.items()),
        "notes": "; ".join(notes) or "none",
        "labels": labels(work.data.splits["train"]),
        "tokens": lengths(work.examples["train"], work.data_spec.max_tokens or 0),
        "example": example(work),
        "adapted": f"{sum(found.matched.values())} modules: {_counted(found.matched)}; layers "
        + (target_modules.described_layers(found.layers) or "none"),
        "not adapted": _counted(found.unmatched) or "no other linear layer",
        "in full": ", ".join(found.whole) or "no module",
        "trainable": f"{counts.trainable:,} ({100 * counts.trainable / counts.total:.2f} %): LoRA {counts.lora:,}, "
        f"bias {counts.bias:,}, modules_to_save {counts.modules_to_save:,}",
        "adapter": f"{found.adapter_mb:.2f} MB" + (", saved with twice the rank" if spec.lora.changes_base else ""),
        "start": start(spec),
        "rate": rate(spec, work),
        "batch": f"{train.batch_size} examples a step in {math.ceil(train.batch_size / micro)} passes of {micro}"
        + ("" if work.task.divisible or micro == train.batch_size else ", each told from the rows of its pass alone"),
        "steps": f"{found.steps} in all, {found.steps_per_epoch} an epoch",
        "memory": f"about {found.memory.gib:.2f} GiB at the most for one trial ({_phases(found.memory)}), "
        f"{_free(spec)}; training: {_parts(found.memory.parts)}",
        "kept": _kept(spec, found.memory),
        "in slots": _shared(spec, work, found),
        "compute": f"about {found.flops / 1e9:.1f} GFLOP a step",
    }
    for name, text in lines.items():
        print(f"{name + ':':13}{text}")


def show_grid(
    specs: Sequence[TrialSpec], points: Sequence[Mapping[str, Any]], loaded: dict[str, workload.Workload]
) -> None:
    """Print one line a point."""
    rows = []
    for number, (spec, point) in enumerate(zip(specs, points, strict=True)):
        found = plan(spec, loaded[workload.key(spec)])
        rows.append(
            [
                str(number),
                *[str(v) for v in point.values()],
                str(sum(found.matched.values())),
                f"{found.counts.trainable:,}",
                f"{found.adapter_mb:.2f}",
                f"{found.memory.gib:.2f}",
                f"{found.flops / 1e9:.1f}",
                str(found.steps),
            ]
        )
    columns = ["trial", *points[0], "modules", "trainable", "adapter MB", "memory GiB", "GFLOP a step", "steps"]
    console.table("what would run", columns, rows)


def start(spec: TrialSpec) -> str:
    """Say whether the fresh adapter leaves the base model's answers as they are."""
    init = spec.lora.init
    return (init.start_quantised if spec.model.quantization != "none" else "") or init.start


def rate(spec: TrialSpec, work: workload.Workload) -> str:
    """Say how high the learning rate goes."""
    auto = learning_rate.said(spec, work.task, work.skeleton.model)
    return auto or f"train.learning_rate={spec.train.learning_rate:g} at its highest"


def labels(records: Sequence[Mapping[str, Any]]) -> str:
    """Return how often each label or tag occurs in the records, the most frequent first."""
    values: list[Any] = []
    for record in records:
        value = record.get("label", record.get("tags"))
        values += value if isinstance(value, list | tuple) else [value]
    found = Counter(str(v) for v in values if v is not None)
    if not found:
        return "the task has none"
    shown = ", ".join(f"{k} {n}" for k, n in found.most_common(SHOWN_LABELS))
    rest = f", and {len(found) - SHOWN_LABELS} more" if len(found) > SHOWN_LABELS else ""
    return shown + rest


def lengths(examples: Sequence[Example], limit: int) -> str:
    """Return quantiles of the examples' lengths and the share that fills `limit` tokens, which may have been cut."""
    found = sorted(map(len, examples))
    marks = {
        name: found[min(len(found) - 1, int(q * len(found)))]
        for name, q in (("median", 0.5), ("p90", 0.9), ("p99", 0.99))
    }
    full = sum(n >= limit for n in found) / len(found)
    quantiles = ", ".join(f"{k} {v}" for k, v in marks.items())
    return f"{quantiles}, longest {found[-1]}; {full:.1%} fill data.max_tokens={limit} and may be cut"


def example(work: workload.Workload) -> str:
    """Return the first training example decoded, what is supervised between « and »."""
    first = work.examples["train"][0]
    record = work.data.splits["train"][first.row]
    ids = list(next(iter(first.inputs.values())))
    target = first.target
    if isinstance(target, list | tuple) and len(target) == len(ids) and work.task.labels_tokens:
        return _marked(ids, [t != -100 for t in target], work.tokenizer)
    answer = next((record[k] for k in ("label", "target", "answers", "score", "positive") if k in record), "")
    return f"{work.tokenizer.decode(ids)} «{answer}»"


def _marked(ids: Sequence[int], supervised: Sequence[bool], tokenizer: Any) -> str:
    parts, at = [], 0
    while at < len(ids):
        end = at
        while end < len(ids) and supervised[end] == supervised[at]:
            end += 1
        text = tokenizer.decode(ids[at:end])
        parts.append(f"«{text}»" if supervised[at] else text)
        at = end
    return "".join(parts)


def _counted(names: Mapping[str, int]) -> str:
    return ", ".join(f"{k} {n}" for k, n in sorted(names.items()))

"""What only a device shows, beside speed: ways to train one model that have to agree; a part of benchmarks/gpu.py."""

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from card import TOKENIZER, Bench, NoRoom, examples, gap, reason, saved, seeds, spec_of, started, steps

from lorasweep import tasks
from lorasweep.errors import ConfigError
from lorasweep.memory import estimate, out_of_memory
from lorasweep.tasks.task import Example
from lorasweep.training import engine

KINDS = {
    "deterministic": ("train.deterministic=true", "train.slots=4"),
    "fp16": ("train.precision=fp16",),
    "nf4": ("model.quantization=nf4",),
    "int8": ("model.quantization=int8",),
    "gradient_checkpointing": ("train.gradient_checkpointing=true",),
    "adamw_8bit": ("train.optimizer=adamw_8bit",),
    "paged_adamw_8bit": ("train.optimizer=paged_adamw_8bit",),
    "device_map": ("model.device_map=balanced",),
}
"""Several GPUs hold the base with device_map, where there are several; on one it goes through the same code."""

BATCH = 4
LEAST_S = 15.0
"""A check does not begin with less."""

WHOLE, LESS = 16, 0.6
"""Rows of the step that does not fit, and the share of what it takes beside the base that it is left."""


def losses(made: engine.Engine, spec: Any, trials: int = 1, count: int = 8) -> tuple[list[float], float]:
    """Return the first losses of all trials in their order, and the seconds of the later half. Raises NoRoom where a
    trial ended before.
    """
    events = steps(made, seeds(spec, trials), trials)
    with contextlib.closing(events):
        found = list(itertools.islice(events, count * trials // 2))
        began = time.perf_counter()
        found += itertools.islice(events, count * trials - len(found))
        seconds = time.perf_counter() - began
    if len(found) < count * trials:
        raise NoRoom(f"a trial ended before its step {count}")
    return found, seconds


def check(bench: Bench, name: str, shape: dict[str, int]) -> None:
    """Compare each kind with the plain way, one trial with packed ones, and a step that fits with one that does not."""
    data, folder = examples(bench), saved(bench, name, shape)
    if bench.left < LEAST_S:
        bench.skipped.append(f"checks: {max(0.0, bench.left):.0f} s are left")
        return
    spec = spec_of(folder, bench, BATCH)
    plain, plain_s = losses(started(spec, data), spec, 4)
    bench.checks["packed_from_solo"] = gap(plain[::4], losses(started(spec, data), spec)[0])
    for kind, keys in KINDS.items():
        spec = spec_of(folder, bench, BATCH, *keys)
        _noted(bench, kind, partial(_compared, bench, spec, data, plain, plain_s))
    torch.use_deterministic_algorithms(False)
    _noted(bench, "out_of_memory", partial(_short, bench, folder, data))


def _noted(bench: Bench, kind: str, work: Callable[[], dict[str, Any]]) -> None:
    """Do a check; go on with a note after one that fails, or that needs what the machine does not have."""
    if bench.left < LEAST_S:
        bench.skipped.append(f"check of {kind}: no time left")
        return
    try:
        bench.checks[kind] = work()
        if bench.checks[kind].get("bitwise") is False:
            bench.failed.append(f"check of {kind}: two runs differ")
    except (ConfigError, ImportError, torch.OutOfMemoryError) as error:
        bench.skipped.append(f"check of {kind}: {reason(error)}")
    except Exception as error:
        bench.failed.append(f"check of {kind}: {reason(error)}")
    freed(out_of_memory.free)


def freed(free: Callable[[], None]) -> None:
    """Free memory; after an error of the card that stays, even that raises."""
    with contextlib.suppress(RuntimeError):
        free()


def _compared(bench: Bench, spec: Any, data: list[Example], plain: list[float], plain_s: float) -> dict[str, Any]:
    _restart(bench)
    found, seconds = losses(started(spec, data), spec, 4)
    told = {"from_plain": gap(found, plain), "times_as_long": seconds / plain_s, "peak_gib": highest(bench)}
    if spec.train.deterministic:
        told["bitwise"] = losses(started(spec, data), spec, 4)[0] == found
    return told


def _short(bench: Bench, folder: Path, data: list[Example]) -> dict[str, Any]:
    """Return what train.micro_batch_size=auto does where a step does not fit, and how far its losses are off."""
    spec = spec_of(folder, bench, WHOLE, "train.micro_batch_size=auto")
    made = started(spec, data)
    held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    _restart(bench)
    expected, _ = losses(made, spec)
    need = torch.cuda.max_memory_allocated() - held if bench.device.type == "cuda" else 0
    made.clear()
    out_of_memory.free()
    with _smaller(bench, made, held + LESS * need):
        found, _ = losses(made, spec)
    return {"rows": made.limits.rows, "of": WHOLE, "from_plain": gap(found, expected)}


@contextlib.contextmanager
def _smaller(bench: Bench, made: engine.Engine, size: float) -> Iterator[None]:
    """Leave the process so many bytes of the card; on a CPU, refuse passes of more than a quarter of the rows."""
    if bench.device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    task: Any = made.task
    row_losses = task.row_losses

    def refuse(model: Any, batch: Any) -> Any:
        if len(batch.rows) > WHOLE // 4:
            raise torch.OutOfMemoryError("a dry run's own")
        return row_losses(model, batch)

    task.row_losses = refuse
    yield
    del task.row_losses


def _restart(bench: Bench) -> None:
    freed(out_of_memory.free)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def highest(bench: Bench) -> float | None:
    """Return the GiB that were allocated at the most; None without a card."""
    return torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None


def estimated(bench: Bench, spec: Any, data: list[Example], slots: int) -> float | None:
    """Return the GiB that training is to need, as `check` tells before a model is loaded; None, with a note, where that
    cannot be told."""
    examples = {"train": data, "eval": data[:2]}
    try:
        found = estimate.estimate(spec, tasks.make(spec.task_type), TOKENIZER, examples, slots=slots, missing=())
    except estimate.UNCOUNTED as error:
        bench.skipped.append(f"estimate of {slots} slots: {reason(error)}")
        return None
    return max(found.phases["start"], found.phases["training"])

"""Out of memory: what is tried again in smaller passes, what is remembered, and what is said where nothing fits."""

import ctypes
import functools
import gc
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from lorasweep.config.spec import TrainSpec, TrialSpec
from lorasweep.errors import ConfigError
from lorasweep.memory import estimate
from lorasweep.memory.estimate import Examples
from lorasweep.models.base_model import Base
from lorasweep.packing import packed_pass
from lorasweep.tasks.task import Task

MOST_SLOTS = 64

WORDS = (
    *("can't allocate memory", "not enough memory", "Cannot allocate memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    "MPS backend out of memory",
)
"""How errors without a class say that memory ran out: the CPU allocator's, CUDA's and its libraries', Apple's."""

log = logging.getLogger(__name__)


@dataclass
class Limits:
    """What has turned out to fit: of trials of one base on one device."""

    most: int = MOST_SLOTS
    """Trials that share a pass."""
    rows: int | None = None
    """Rows of a trial in a pass, where train.micro_batch_size=auto."""
    eval_rows: int | None = None
    """Rows in a pass of evaluation."""

    def micro(self, train: TrainSpec) -> int:
        """Return the rows that a trial's passes are to have."""
        if train.micro_batch_size != "auto":
            return train.rows
        return min(train.batch_size, self.rows or train.batch_size)

    def less(self, train: TrainSpec) -> bool:
        """Halve the rows of trials like this one; return False where there is no less."""
        rows = self.micro(train)
        if train.micro_batch_size != "auto" or rows == 1:
            return False
        self.rows = rows // 2
        log.warning("out of memory: train.micro_batch_size=auto is %d from now on", self.rows)
        return True

    def evaluated(self, train: TrainSpec, evaluate: Callable[[int], None]) -> bool:
        """Evaluate with as many rows per pass as fit; return False if not even one does."""
        while True:
            rows = min(train.eval_batch_size, self.eval_rows or train.eval_batch_size)
            if not attempt(functools.partial(evaluate, rows)):
                return True
            if rows == 1:
                return False
            self.eval_rows = rows // 2
            log.warning("out of memory: evaluation takes %d rows a pass from now on", self.eval_rows)

    def share_less(self, trials: int, why: str) -> None:
        """From now on let at most this many trials share a pass."""
        self.most = trials
        log.warning("at most %d trials share a pass from now on: %s", trials, why)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is that of a device or a machine without room."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    )


def attempt(action: Callable[[], None]) -> str:
    """Carry out an action; return nothing, or the words of an out-of-memory error.

    What the action held is freed by then: its error is gone, and with it the frames that its traceback keeps.
    """
    try:
        action()
        return ""
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        why = (str(error) or "out of memory").splitlines()[0]
    free()
    return why


@functools.cache
def _libc() -> ctypes.CDLL | None:
    """Return the C library, None where it is not to be had so; only GNU's has malloc_trim."""
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def free() -> None:
    """Give memory that nobody holds back to the device, and on Linux to the system: a container counts it as used."""
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def refusal(spec: TrialSpec, base: Base | None, task: Task, tokenizer: object, examples: Examples, rows: int) -> str:
    """Return, in one line, what a trial needs at this many rows per pass, what is free, and which keys lower it."""
    smaller = replace(spec, train=replace(spec.train, micro_batch_size=rows))
    missing = None if base is None else base.missing
    try:
        found = estimate.estimate(smaller, task, tokenizer, examples, missing=missing)
    except ConfigError as error:
        need = f"what it needs is not known ({error})"
    else:
        parts = ", ".join(f"{name} {gib:.2f}" for name, gib in found.parts.items() if gib >= 0.005)
        need = f"it needs about {found.gib:.2f} GiB ({parts or 'little'} in training) with {rows} rows a pass"
    return f"out of memory: {need}; {estimate.told(spec.train)}; smaller: {', '.join(keys(spec, rows, task))}"


def keys(spec: TrialSpec, rows: int, task: Task) -> list[str]:
    """Return overrides that would make a trial's memory less, the cheapest first."""
    out = []
    if rows > 1:
        out.append("train.micro_batch_size=auto" if task.divisible else f"train.batch_size={rows // 2}")
    if not spec.train.gradient_checkpointing:
        out.append("train.gradient_checkpointing=true")
    if spec.model.quantization == "none":
        out.append("model.quantization=nf4")
    if (
        torch.cuda.device_count() > 1
        and spec.train.device != "cpu"
        and not (spec.model.device_map or spec.model.decoder)
    ):
        out.append("model.device_map=auto")
    tokens = spec.data.max_tokens or task.found.get("max_tokens", 128)
    out.append(f"data.max_tokens={max(4, tokens // 2)}")
    if spec.lora.target_modules != "qv":
        out.append("lora.target_modules=qv")
    if not packed_pass.alone_reason(spec) and spec.train.slots != 1:
        out.append("train.slots=1")
    return out

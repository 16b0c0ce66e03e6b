"""What benchmarks/gpu.py measures with: the run's settings, random models, texts, and the engine's steps in rounds."""

import itertools
import time
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.data import builtin
from lorasweep.hardware import device
from lorasweep.memory import out_of_memory
from lorasweep.models import base_model
from lorasweep.tasks.task import Example
from lorasweep.training import engine, workload

WORDS = {
    **{"tokens_per_s": "{:,.0f}", "over_solo": "{:.2f}", "over_trainer": "{:.2f}", "of_peak": "{:.1%}"},
    **{
        "j_per_1k": "{:.2f}",
        "peak_gib": "{:.2f}",
        "estimate_gib": "{:.2f}",
        "compile_s": "{:.1f}",
        "over_plain": "{:.2f}",
    },
    **{"pays_after": "{:,.0f} steps", "gap": "{:.1e}"},
}


class NoRoom(Exception):
    """The engine went on with fewer trials a pass, or none: the row would be of something else."""


@dataclass
class Bench:
    """Settings of a run, and what it has found."""

    device: torch.device
    tiny: bool
    deadline: float
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    compiled: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    """What the time, the memory or the machine left no room for."""
    failed: list[str] = field(default_factory=list)
    """What should have gone."""

    row_s: float = 1.5
    """Seconds of steps that a row is measured over, at least two of each trial."""

    def found(self) -> dict[str, Any]:
        return {"rows": self.rows, "compiled": self.compiled, "checks": self.checks} | {
            "skipped": self.skipped,
            "failed": self.failed,
        }

    @property
    def length(self) -> int:
        return 16 if self.tiny else 256

    @property
    def words(self) -> int:
        return 512 if self.tiny else 32_000

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


TOKENIZER: Any = SimpleNamespace(pad_token_id=0)
"""All that the engine asks of one here: texts are token ids already."""


def examples(bench: Bench) -> list[Example]:
    """Return texts of equal length: the corpus's words, each by the same number everywhere."""
    words = (w for d in builtin.docstrings() for w in d.text.split())
    ids = [1 + zlib.crc32(w.encode()) % (bench.words - 1) for w in words]
    count = min(512, len(ids) // bench.length)
    rows = [ids[i * bench.length : (i + 1) * bench.length] for i in range(count)]
    return [Example(i, {"input_ids": r}, target=r, supervised=bench.length - 1) for i, r in enumerate(rows)]


def saved(bench: Bench, name: str, shape: dict[str, int]) -> Path:
    """Write a random model once; return its folder."""
    folder = bench.folder / name
    if not folder.exists():
        config = transformers.LlamaConfig(vocab_size=bench.words, max_position_embeddings=512, **shape)
        torch.manual_seed(0)
        dtype = device.dtype_of(spec_of(folder, bench, 1).train, bench.device)
        with bench.device:
            net = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        net.save_pretrained(folder)
    return folder


def spec_of(folder: Path, bench: Bench, batch: int, *more: str) -> Any:
    endless = [
        "train.max_steps=1000000",
        "train.eval_every=1000000",
        "train.warmup_ratio=0",
        "train.prefix_cache_gib=0",
    ]
    here = [f"model.pretrained={folder}", f"train.device={bench.device.type}"]
    return compose.compose_trial(
        ["task_type=causal_lm", *endless, *here, "lora.r=16", f"train.batch_size={batch}", *more]
    )


def started(spec: Any, data: list[Example]) -> engine.Engine:
    task = tasks.make(spec.task_type)
    base = base_model.load(spec.model, spec.train, task, TOKENIZER)
    return engine.Engine(base, task, workload.Prepared(data, data[:2], 0))


def seeds(spec: Any, count: int) -> list[Any]:
    return [compose.compose_trial([*spec.overrides, f"train.seed={i}"]) for i in range(count)]


def steps(made: engine.Engine, specs: Sequence[Any], width: int) -> Generator[float]:
    """Yield the loss after each optimiser step of any trial."""
    jobs = [engine.Job(i, spec) for i, spec in enumerate(specs)][::-1]
    made.width = width
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.StepEvent):
            yield event.loss


def wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


def rounds(made: engine.Engine, events: Iterator[float], slots: int) -> Iterator[list[float]]:
    """Yield the losses of one step of each trial. Raises NoRoom where they do not share their passes any more."""
    while True:
        found = list(itertools.islice(events, slots))
        if len(found) < slots or len(made.slots) < slots or made.limits.most < out_of_memory.MOST_SLOTS:
            raise NoRoom("memory was short, or a trial ended: fewer went on")
        yield found


def timed(bench: Bench, each: Iterator[list[float]]) -> tuple[int, float]:
    """Return how many rounds were taken and their seconds."""
    wait(bench)
    began, done = time.perf_counter(), 0
    while done < 2 or time.perf_counter() - began < bench.row_s:
        next(each)
        done += 1
    wait(bench)
    return done, time.perf_counter() - began


def afresh(made: engine.Engine) -> None:
    """Forget trials, and what has turned out to fit."""
    made.clear()
    made.passes.limits = out_of_memory.Limits()
    out_of_memory.free()


def gap(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def line(found: dict[str, Any], columns: Sequence[str]) -> str:
    cells = [WORDS.get(c, "{}").format(found[c]) if found[c] is not None else "-" for c in columns]
    return f"| {' | '.join(cells)} |"


def head(columns: Sequence[str]) -> str:
    return f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}"

"""What one card gives: Llama-shaped models of 0.1B, 0.5B and 1.5B, made here, on words of the built-in corpus.

    python benchmarks/gpu.py                     under 8 minutes, no network; a table, and gpu.json
    python benchmarks/gpu.py --tiny --device cpu the dry run: the same script with toy sizes

LoRA r=16 on all linear layers, 256 tokens a text. A row is a model, a batch size and a number of slots: tokens a second
of all trials together, over one trial at a time (slots=1), over HF Trainer + peft with the same batch; the share of the
card's measured matmul peak that the linear layers reach; joules a thousand tokens where the driver tells; peak memory.
Below it, checks that only a device can make: determinism bit for bit and its cost, packed against solo losses, fp16,
nf4 and int8 bases. What the time budget leaves no room for is named, never silently left out.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the check of determinism

import torch
import transformers

from lorasweep import adapter, compose, corpus, device, engine, model, pace, peak, retry, tasks
from lorasweep.errors import LorasweepError
from lorasweep.tasks import Example

SIZES = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "0.5B": {"hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 22, "num_attention_heads": 20},
    "1.5B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 28, "num_attention_heads": 16},
}
TINY = {
    "toy": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "toy 2": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2},
}
BATCHES = (1, 4, 16)
SLOTS = (1, 2, 4, 8, 16, 32)
ROW_S = 1.5
"""Seconds of steps that a row is measured over, at least two of each trial."""

COLUMNS = ("model", "batch", "slots", "tokens_per_s", "over_solo", "over_trainer", "of_peak", "j_per_1k", "peak_gib")


@dataclass
class Bench:
    """Settings of a run, and what it has found."""

    device: torch.device
    tiny: bool
    deadline: float
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

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
    words = (w for d in corpus.docstrings() for w in d.text.split())
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
    here = [f"model.pretrained={folder}", "model.sha256=null", f"train.device={bench.device.type}"]
    return compose.compose_trial(
        ["task_type=causal_lm", *endless, *here, "lora.r=16", f"train.batch_size={batch}", *more]
    )


def started(spec: Any, data: list[Example]) -> engine.Engine:
    task = tasks.make(spec.task_type)
    base = model.load(spec.model, spec.train, task, TOKENIZER)
    return engine.Engine(base, task, engine.Prepared(data, data[:2], 0))


def steps(made: engine.Engine, specs: Sequence[Any], width: int) -> Iterator[float]:
    """Yield the loss after each optimiser step of any trial."""
    jobs = [engine.Job(i, spec) for i, spec in enumerate(specs)][::-1]
    made.width = width
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.StepEvent):
            yield event.loss


def wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize()


# --- rows ------------------------------------------------------------------------------------------------------------


def row(bench: Bench, made: engine.Engine, name: str, batch: int, slots: int, spec: Any) -> dict[str, Any]:
    """Return what a number of slots gives: the trials differ in their seeds only."""
    specs = [compose.compose_trial([*spec.overrides, f"train.seed={i}"]) for i in range(slots)]
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    events = steps(made, specs, slots)
    for _ in range(2 * slots):
        next(events)
    wait(bench)
    made.energy.used()
    began, done = time.perf_counter(), 0
    while done < 2 * slots or time.perf_counter() - began < ROW_S:
        for _ in range(slots):
            next(events)
        done += slots
    wait(bench)
    seconds, tokens = time.perf_counter() - began, done * batch * bench.length
    joules = sum(s.energy_j for s in made.slots) / sum(s.step for s in made.slots) * done
    trained = sum(p.numel() for p in made.slots[0].attached.parameters())
    assert len(made.slots) == slots and made.limits.most == retry.MOST_SLOTS, "the trials did not share their passes"
    events.close()
    return {
        "model": name,
        "batch": batch,
        "slots": slots,
        "tokens_per_s": tokens / seconds,
        "of_peak": peak.share(made.base.model, trained, tokens, seconds),
        "j_per_1k": 1000 * joules / tokens if made.energy.is_known else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if bench.device.type == "cuda" else None,
    }


def trainer_rate(bench: Bench, made: engine.Engine, batch: int, spec: Any, data: list[Example]) -> float:
    """Return the tokens a second of HF Trainer + peft, from its third step on."""
    import peft

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait(bench)
            times.append(time.perf_counter())
            control.should_training_stop = len(times) > 4 and times[-1] - times[2] > ROW_S

    net = peft.get_peft_model(made.base.model, adapter.config(spec.lora, spec.task_type, made.base))
    arguments = transformers.TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        per_device_train_batch_size=batch,
        max_steps=100_000,
        learning_rate=1e-3,
        bf16=made.base.model.dtype == torch.bfloat16,
        use_cpu=bench.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = [{"input_ids": e.inputs["input_ids"], "labels": e.target} for e in data]
    try:
        transformers.Trainer(model=net, args=arguments, train_dataset=rows, callbacks=[Clock()]).train()
    finally:
        net.unload()
        made.base.model.__dict__.pop("peft_config", None)
        made.base.model.requires_grad_(False)
        made.base.model.eval()
    return (len(times) - 3) * batch * bench.length / (times[-1] - times[2])


def measure(bench: Bench, name: str, shape: dict[str, int], until: float) -> None:
    """Add the rows of a model, as many as the time up to `until` allows."""
    data = examples(bench)
    folder = saved(bench, name, shape)
    made = started(spec_of(folder, bench, 1), data)
    for batch in (1, 2) if bench.tiny else BATCHES:
        spec = spec_of(folder, bench, batch)
        solo = trainer = None
        for slots in (1, 2, 4) if bench.tiny else SLOTS:
            if time.monotonic() > until:
                bench.skipped.append(f"{name}, batch {batch}, from {slots} slots on: no time left")
                break
            try:
                found = row(bench, made, name, batch, slots, spec)
                if slots == 1:
                    solo = found["tokens_per_s"]
                    trainer = trainer_rate(bench, made, batch, spec, data)
            except torch.OutOfMemoryError:
                made.clear()
                torch.cuda.empty_cache()
                bench.skipped.append(f"{name}, batch {batch}, from {slots} slots on: out of memory")
                break
            found |= {"over_solo": found["tokens_per_s"] / solo, "over_trainer": found["tokens_per_s"] / trainer}
            bench.rows.append(found)
            print(line(found), flush=True)


def line(found: dict[str, Any]) -> str:
    shown = {
        "tokens_per_s": "{:,.0f}",
        "over_solo": "{:.2f}",
        "over_trainer": "{:.2f}",
        "of_peak": "{:.1%}",
        "j_per_1k": "{:.2f}",
        "peak_gib": "{:.1f}",
    }
    cells = [shown.get(c, "{}").format(found[c]) if found[c] is not None else "not known" for c in COLUMNS]
    return f"| {' | '.join(cells)} |"


# --- checks ----------------------------------------------------------------------------------------------------------


def losses(spec: Any, data: list[Example], trials: int = 1, count: int = 8) -> tuple[list[float], float]:
    """Return the first losses of all trials in their order, and the seconds of the later half."""
    specs = [compose.compose_trial([*spec.overrides, f"train.seed={i}"]) for i in range(trials)]
    events = steps(started(spec, data), specs, trials)
    found = [next(events) for _ in range(count * trials // 2)]
    began = time.perf_counter()
    found += [next(events) for _ in range(count * trials - len(found))]
    took = time.perf_counter() - began
    events.close()
    return found, took


def gap(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def check(bench: Bench, name: str, shape: dict[str, int]) -> None:
    """Compare ways to train one model that have to agree."""
    data, folder = examples(bench), saved(bench, name, shape)
    more = {
        "deterministic": ("train.deterministic=true", "train.slots=4"),
        "fp16": ("train.precision=fp16",),
        "nf4": ("model.quantization=nf4",),
        "int8": ("model.quantization=int8",),
    }
    plain, plain_s = losses(spec_of(folder, bench, 4), data, 4)
    one, _ = losses(spec_of(folder, bench, 4), data, 1)
    bench.checks["packed_from_solo"] = gap(plain[::4], one)
    for kind, keys in more.items():
        if bench.left < 20 and not bench.tiny:
            bench.skipped.append(f"check of {kind}: no time left")
            continue
        try:
            found, seconds = losses(spec_of(folder, bench, 4, *keys), data, 4)
        except (LorasweepError, ImportError, RuntimeError) as error:
            bench.skipped.append(f"check of {kind}: {type(error).__name__}: {str(error)[:200]}")
            continue
        bench.checks[kind] = {"from_plain": gap(found, plain), "times_as_long": seconds / plain_s}
        if kind == "deterministic":
            again, _ = losses(spec_of(folder, bench, 4, *keys), data, 4)
            bench.checks[kind]["bitwise"] = again == found
    torch.use_deterministic_algorithms(False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a dry run, whose numbers mean nothing")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds in all, about")
    parser.add_argument("--to", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    pace.overhead = lambda *_: math.inf  # all slots share every pass: that is what is measured
    train = compose.compose_trial([f"train.device={given.device}"]).train
    where = device.device_of(train)
    global ROW_S
    ROW_S = 0.05 if given.tiny else ROW_S
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, given.tiny, time.monotonic() + given.budget, Path(folder))
        sizes = TINY if given.tiny else SIZES
        card = torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine()
        dtype = device.dtype_of(train, where)
        device.set_up(train, where)
        top = peak.matmul_peak(torch.empty(0, device=where).device, dtype)
        print(f"{card}, torch {torch.__version__}, {dtype}, matmul peak {top / 1e12:.2f} TFLOP/s")
        print(f"| {' | '.join(COLUMNS)} |\n|---|{'--:|' * (len(COLUMNS) - 1)}")
        for i, (name, shape) in enumerate(sizes.items()):
            share = (bench.left - 60) / (len(sizes) - i)  # the last minute is for the checks
            measure(bench, name, shape, time.monotonic() + share)
        check(bench, *next(iter(sizes.items())))
    for name, found in bench.checks.items():
        print(f"{name}: {found}")
    for note in bench.skipped:
        print(f"skipped: {note}")
    about = {"card": card, "torch": torch.__version__, "dtype": str(dtype), "matmul_peak": top, "tiny": given.tiny}
    given.to.write_text(json.dumps(about | {"rows": bench.rows, "checks": bench.checks, "skipped": bench.skipped}))
    print(f"{len(bench.rows)} rows in {given.to}")
    return 0 if bench.rows else 1


if __name__ == "__main__":
    sys.exit(main())

"""What one card gives: Llama-shaped models of 0.1B, 0.5B and 1.5B, made here, on words of the built-in corpus.

    python benchmarks/gpu.py                     under 8 minutes, no network; a table, and gpu.json
    python benchmarks/gpu.py --tiny --device cpu the dry run: the same script with toy sizes

LoRA r=16 on all linear layers, 256 tokens a text. A row is a model, a batch size and a number of slots: tokens a second
of all trials together, over one trial at a time (slots=1), over HF Trainer + peft with the same batch; the share of the
card's measured matmul peak that the linear layers reach; joules a thousand tokens where the driver tells; peak memory.
estimate_gib is what `check` would have told of it, for some rows. Below it, checks that only a device can make:
determinism bit for bit and its cost, packed against solo losses, fp16, nf4 and int8 bases, layers that compute twice,
small and paged optimisers, a base spread by device_map, and a step that does not fit into memory. Last, torch.compile
without and with CUDA graphs: what it takes to compile, what a step gains, and after how many steps of one set of trials
that has paid. What the time budget leaves no room for, or what cannot be done, is named with the reason, never silently
left out; what fails is named too, the rest goes on, and the exit code is 1.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the check of determinism

import torch
import transformers
from card import (
    Bench,
    NoRoom,
    afresh,
    examples,
    head,
    line,
    reason,
    rounds,
    saved,
    seeds,
    spec_of,
    started,
    steps,
    timed,
    wait,
)
from checks import check, estimated, freed, highest
from compiled import COMPILED, compiled

from lorasweep.config import compose
from lorasweep.hardware import device, matmul_peak
from lorasweep.lora import peft_config
from lorasweep.memory import out_of_memory
from lorasweep.packing import pass_cost
from lorasweep.tasks.task import Example
from lorasweep.training import engine

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
RESERVED_S = {"checks": 60.0, "compiled": 130.0}
"""What the table of models leaves of the budget."""

COLUMNS = (
    *("model", "batch", "slots", "tokens_per_s", "over_solo", "over_trainer", "of_peak", "j_per_1k"),
    *("peak_gib", "estimate_gib"),
)
ESTIMATED = {"0.1B": (1, 4), "toy": (1, 4)}
"""Slots at which memory is estimated too, in rows of the middle batch size; 1 for other models, as it takes seconds."""

# --- rows ------------------------------------------------------------------------------------------------------------


def row(bench: Bench, made: engine.Engine, name: str, batch: int, slots: int, spec: Any) -> dict[str, Any]:
    """Return what a number of slots gives: the trials differ in their seeds only."""
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    events = steps(made, seeds(spec, slots), slots)
    with contextlib.closing(events):
        each = rounds(made, events, slots)
        next(each), next(each)
        made.passes.energy.used()
        done, seconds = timed(bench, each)
        tokens = done * slots * batch * bench.length
        joules = sum(s.energy_j for s in made.slots) / sum(s.step for s in made.slots) * done * slots
        flops = made.slots[0].flops_a_token
    return {
        "model": name,
        "batch": batch,
        "slots": slots,
        "round_s": seconds / done,
        "tokens_per_s": tokens / seconds,
        "of_peak": matmul_peak.share(made.base.model, matmul_peak.rate(flops, tokens, seconds)),
        "j_per_1k": 1000 * joules / tokens if made.passes.energy.is_known else None,
        "peak_gib": highest(bench),
        "estimate_gib": None,
    }


def trainer_rate(bench: Bench, made: engine.Engine, batch: int, spec: Any, data: list[Example]) -> float:
    """Return the tokens a second of HF Trainer + peft, from its third step on."""
    import peft

    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wait(bench)
            times.append(time.perf_counter())
            control.should_training_stop = len(times) > 4 and times[-1] - times[2] > bench.row_s

    net = peft.get_peft_model(made.base.model, peft_config.config(spec.lora, spec.task_type, made.base))
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
        trainer = transformers.Trainer(model=net, args=arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    finally:
        net.unload()
        made.base.model.__dict__.pop("peft_config", None)
        made.base.model.requires_grad_(False)
        made.base.model.eval()
    return (len(times) - 3) * batch * bench.length / (times[-1] - times[2])


def measure(bench: Bench, name: str, shape: dict[str, int], until: float) -> None:
    """Add the rows of a model, as many as the time up to `until` allows."""
    if time.monotonic() > until:
        bench.skipped.append(f"{name}: no time left")
        return
    data = examples(bench)
    folder = saved(bench, name, shape)
    made = started(spec_of(folder, bench, 1), data)
    batches = (1, 2) if bench.tiny else BATCHES
    for batch in batches:
        spec = spec_of(folder, bench, batch)
        done: list[dict[str, Any]] = []
        trainer = None
        for slots in (1, 2, 4) if bench.tiny else SLOTS:
            why = too_long(done, slots, until)
            if why:
                bench.skipped.append(f"{name}, batch {batch}, from {slots} slots on: {why}")
                break
            try:
                found = row(bench, made, name, batch, slots, spec)
            except Exception as error:  # the other rows may go; the note and the exit code say that this one did not
                full = isinstance(error, NoRoom) or out_of_memory.is_out_of_memory(error)
                notes = bench.skipped if full else bench.failed
                notes.append(f"{name}, batch {batch}, from {slots} slots on: {reason(error)}")
                freed(lambda: afresh(made))
                break
            done.append(found)
            if slots == 1:
                trainer = beside(bench, made, batch, spec, data, name)
            found["over_solo"] = found["tokens_per_s"] / done[0]["tokens_per_s"]
            found["over_trainer"] = found["tokens_per_s"] / trainer if trainer else None
            if batch == batches[1] and slots in ESTIMATED.get(name, (1,)):
                found["estimate_gib"] = estimated(bench, spec, data, slots)
            bench.rows.append(found)
            print(line(found, COLUMNS), flush=True)


def too_long(done: Sequence[dict[str, Any]], slots: int, until: float) -> str:
    """Return why there is no time for so many slots, if so: as long a token as with the slots before, four steps."""
    left = until - time.monotonic()
    need = 4 * done[-1]["round_s"] * slots / done[-1]["slots"] if done else 0.0
    return f"it would take {need:.0f} s, {max(0.0, left):.0f} s are left" if left < max(need, 0.1) else ""


def beside(bench: Bench, made: engine.Engine, batch: int, spec: Any, data: list[Example], name: str) -> float | None:
    """Return the tokens a second of Trainer; None, with a note, where it does not run."""
    try:
        return trainer_rate(bench, made, batch, spec, data)
    except Exception as error:  # whatever Trainer meets: our own rows do not hang on it
        freed(out_of_memory.free)
        bench.skipped.append(f"{name}, batch {batch}, HF Trainer: {reason(error)}")
        return None


def run(bench: Bench, sizes: dict[str, dict[str, int]]) -> None:
    """Fill the tables; what fails is named, and the rest goes on."""
    print(head(COLUMNS))
    for i, (name, shape) in enumerate(sizes.items()):
        share = (bench.left - sum(RESERVED_S.values())) / (len(sizes) - i)
        with failing(bench, name):
            measure(bench, name, shape, time.monotonic() + share)
    with failing(bench, "checks"):
        check(bench, *next(iter(sizes.items())))
    for name, found in bench.checks.items():
        print(f"{name}: {found}")
    print(f"\n{head(COMPILED)}")
    for name, shape in [*sizes.items()][: 1 if bench.tiny else None]:
        with failing(bench, f"{name}, torch.compile"):
            compiled(bench, name, shape)


@contextlib.contextmanager
def failing(bench: Bench, what: str) -> Iterator[None]:
    """Name what raises, and go on."""
    try:
        yield
    except Exception as error:
        bench.failed.append(f"{what}: {reason(error)}")
    freed(out_of_memory.free)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a dry run, whose numbers mean nothing")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds in all, about")
    parser.add_argument("--to", type=Path, default=Path("gpu.json"))
    given = parser.parse_args()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # transformers' own, about its Trainer
    pass_cost.overhead = lambda *_: math.inf  # all slots share every pass: that is what is measured
    train = compose.compose_trial([f"train.device={given.device}"]).train
    where = device.device_of(train)
    card = torch.cuda.get_device_name() if where.type == "cuda" else platform.processor() or platform.machine()
    dtype = device.dtype_of(train, where)
    began = time.monotonic()
    device.set_up(train, where)
    top = matmul_peak.matmul_peak(torch.empty(0, device=where).device, dtype)
    print(f"{card}, torch {torch.__version__}, {dtype}, matmul peak {top / 1e12:.2f} TFLOP/s")
    about = {"card": card, "torch": torch.__version__, "dtype": str(dtype), "matmul_peak": top, "tiny": given.tiny}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(where, given.tiny, began + given.budget, Path(folder), row_s=0.05 if given.tiny else 1.5)
        try:
            run(bench, TINY if given.tiny else SIZES)
        finally:  # what is there is there, however it ends
            seconds = time.monotonic() - began
            given.to.write_text(json.dumps(about | bench.found() | {"seconds": seconds}, indent=1))
    for note in bench.skipped:
        print(f"skipped: {note}")
    for note in bench.failed:
        print(f"FAILED: {note}")
    print(f"{len(bench.rows)} rows and {len(bench.compiled)} of torch.compile in {given.to}, {seconds:.0f} s")
    return 0 if bench.rows and not bench.failed else 1


if __name__ == "__main__":
    sys.exit(main())

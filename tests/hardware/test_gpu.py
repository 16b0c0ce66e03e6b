"""What needs a GPU, and the dry run of benchmarks/gpu.py, which does not."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.parity import DROPPED, PLAIN, alone, run, spec_of, trainer, workload_of

from lorasweep.hardware import matmul_peak
from lorasweep.packing import pass_cost
from lorasweep.training import engine, passes

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"
EPS = 2.0**-8
"""Relative rounding of bf16."""

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


@pytest.mark.slow
def test_dry_run_fills_every_row_and_every_check(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--to", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    (paged,) = [n for n in found["skipped"] if "torch.compile" not in n]
    assert paged.startswith("check of paged_adamw_8bit: ConfigError") and "there is none on the cpu" in paged
    assert found["tiny"] and len(found["rows"]) == 12 and found["failed"] == []
    estimates = [(r["model"], r["batch"], r["slots"]) for r in found["rows"] if r["estimate_gib"]]
    assert estimates == [("toy", 2, 1), ("toy", 2, 4), ("toy 2", 2, 1)]
    assert all(r["tokens_per_s"] > 0 and 0 < r["of_peak"] < 1 and r["over_trainer"] > 0 for r in found["rows"])
    assert found["checks"]["deterministic"]["bitwise"] and found["checks"]["packed_from_solo"] < 1e-4
    assert len(found["compiled"]) + len(found["skipped"]) - 1 == 2, "a row, or why there is none: no compiler, no time"
    for one in found["compiled"]:
        assert one["compile_s"] > 0 and one["gap"] < 1e-5 and one["graphs"] == 1
    same = ("gradient_checkpointing", "device_map", "out_of_memory")
    assert all(found["checks"][kind]["from_plain"] < 1e-4 for kind in same)
    assert found["checks"]["out_of_memory"]["rows"] == 4, "a quarter of 16: halved twice"
    assert found["checks"].keys() == {"packed_from_solo", "deterministic", "fp16", "nf4", "int8", "adamw_8bit", *same}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """The script's own settings, of a dry run."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))
    card = importlib.import_module("card")
    return card.Bench(torch.device("cpu"), True, time.monotonic() + 300, tmp_path, row_s=0.01)


def test_rows_end_with_a_note_where_memory_ends(bench, monkeypatch):
    gpu, backward = importlib.import_module("gpu"), passes.Passes._backward

    def short(self, group, together):
        if len(group) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        backward(self, group, together)

    monkeypatch.setattr(passes.Passes, "_backward", short)
    monkeypatch.setattr(gpu, "beside", lambda *a: 1000.0)
    gpu.measure(bench, "toy", gpu.TINY["toy"], time.monotonic() + 300)
    assert [(r["batch"], r["slots"]) for r in bench.rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    short = "NoRoom: memory was short, or a trial ended: fewer went on"
    assert bench.skipped == [f"toy, batch {b}, from 4 slots on: {short}" for b in (1, 2)]


def test_row_that_would_take_longer_than_is_left_is_named(bench):
    gpu = importlib.import_module("gpu")
    until = time.monotonic() + 10
    assert gpu.too_long([], 1, until) == ""
    assert gpu.too_long([{"round_s": 1.0, "slots": 2}], 4, until) == ""
    assert gpu.too_long([{"round_s": 5.0, "slots": 2}], 4, until).startswith("it would take 40 s, ")
    gpu.measure(bench, "toy", gpu.TINY["toy"], time.monotonic() - 1)
    assert bench.rows == [] and bench.skipped == ["toy: no time left"]


def test_what_fails_is_named_and_the_rest_goes_on(bench, monkeypatch):
    gpu = importlib.import_module("gpu")
    row = gpu.row

    def broken(bench, made, name, batch, slots, spec):
        if (batch, slots) == (1, 2):
            raise ValueError("no kernel for this")
        return row(bench, made, name, batch, slots, spec)

    def lost(*_):
        raise RuntimeError("the card is lost")

    monkeypatch.setattr(gpu, "row", broken)
    monkeypatch.setattr(gpu, "beside", lambda *a: 1000.0)
    monkeypatch.setattr(gpu, "check", lost)
    monkeypatch.setattr(gpu, "compiled", lambda *a: None)
    gpu.run(bench, {"odd": gpu.TINY["toy"] | {"num_attention_heads": 0}, "toy": gpu.TINY["toy"]})
    filled = [(r["model"], r["batch"], r["slots"]) for r in bench.rows]
    assert filled == [("toy", 1, 1), ("toy", 2, 1), ("toy", 2, 2), ("toy", 2, 4)]
    odd, *others = bench.failed
    assert odd.startswith("odd: ")
    assert others[0] == "toy, batch 1, from 2 slots on: ValueError: no kernel for this"
    assert others[1:] == ["checks: RuntimeError: the card is lost"]


def test_checks_agree_where_memory_is_short_too(bench):
    checks = importlib.import_module("checks")
    folder = checks.saved(bench, "toy", importlib.import_module("gpu").TINY["toy"])
    found = checks._short(bench, folder, checks.examples(bench))
    assert found["rows"] == 4 and found["of"] == 16 and found["from_plain"] < 1e-5
    spec = checks.spec_of(folder, bench, checks.WHOLE)  # not auto: nothing is halved
    made = checks.started(spec, checks.examples(bench))

    def short():
        with checks._smaller(bench, made, 0):
            checks.losses(made, spec)

    checks._noted(bench, "out_of_memory", short)
    assert bench.failed == ["check of out_of_memory: NoRoom: a trial ended before its step 8"]
    bench.deadline = time.monotonic()
    checks._noted(bench, "nf4", short)
    assert bench.skipped == ["check of nf4: no time left"]


def test_compiler_that_fails_or_takes_too_long_leaves_a_note(bench, monkeypatch):
    compiled = importlib.import_module("compiled")

    def broken(*a):
        raise ValueError("no code for this")

    def endless(*a):
        time.sleep(60)

    shape = importlib.import_module("gpu").TINY["toy"]
    monkeypatch.setattr(compiled, "COMPILE_S", 15.1)
    monkeypatch.setattr(compiled, "_row", broken)
    compiled.compiled(bench, "toy", shape)
    monkeypatch.setattr(compiled, "COMPILE_S", 0.1)
    monkeypatch.setattr(compiled, "LEAST_S", 0.0)
    monkeypatch.setattr(compiled, "_row", endless)
    compiled.compiled(bench, "toy", shape)
    bench.deadline = time.monotonic() - 1
    compiled.compiled(bench, "toy", shape)
    notes = [n.partition("torch.compile")[2] for n in bench.skipped]
    assert notes[:2] == [f" {m}: ValueError: no code for this" for m in ("default", "reduce-overhead")]
    assert notes[2:4] == [f" {m}: TimeoutError: not done after 0 s" for m in ("default", "reduce-overhead")]
    assert notes[4:] == [": 0 s are left"] and bench.compiled == []


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize(
    "more", [(), ("train.precision=fp16",), ("model.quantization=nf4",), ("model.quantization=int8",)]
)
def test_packed_trials_equal_solo_ones_to_rounding_on_a_gpu(tiny_llama, monkeypatch, more):
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))
    keys = ("train.device=cuda", "train.max_steps=1", *more)
    specs = [spec_of("causal_lm", tiny_llama, *one, *keys) for one in ((), PLAIN, DROPPED)]
    work = workload_of("causal_lm", tiny_llama)
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 3)
    for i, spec in enumerate(specs):
        expected = alone(spec, work, i)
        assert found[i].losses == pytest.approx(expected.losses, rel=4 * EPS)
        assert {t.dtype for t in found[i].tensors.values()} == {torch.float32}


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_small_optimiser_trains_on_a_gpu(tiny_llama, name):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")
    spec = spec_of("causal_lm", tiny_llama, "train.device=cuda", f"train.optimizer={name}", "lora.r=64")
    found = run(trainer(spec, workload_of("causal_lm", tiny_llama)), [engine.Job(0, spec)], 1)[0]
    assert found.state == "COMPLETE" and found.losses[-1] < found.losses[0]


@pytest.mark.gpu
@needs_a_gpu
def test_peak_of_a_gpu_is_that_of_its_tensor_cores():
    assert matmul_peak.matmul_peak(torch.device("cuda", 0), torch.bfloat16) > 1e13

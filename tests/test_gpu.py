"""What needs a GPU, and the dry run of benchmarks/gpu.py, which does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_packed import DROPPED, PLAIN, alone, run, spec_of, trainer, workload

from lorasweep import engine, pace, peak

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
EPS = 2.0**-8
"""Relative rounding of bf16."""

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")


@pytest.mark.slow
def test_dry_run_fills_every_row_and_every_check(tmp_path):
    command = [sys.executable, str(SCRIPT), "--tiny", "--device", "cpu", "--to", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["tiny"] and len(found["rows"]) == 12 and found["skipped"] == []
    assert all(r["tokens_per_s"] > 0 and 0 < r["of_peak"] < 1 and r["over_trainer"] > 0 for r in found["rows"])
    assert found["checks"]["deterministic"]["bitwise"] and found["checks"]["packed_from_solo"] < 1e-4
    assert found["checks"].keys() == {"packed_from_solo", "deterministic", "fp16", "nf4", "int8"}


@pytest.mark.gpu
@needs_a_gpu
@pytest.mark.parametrize(
    "more", [(), ("train.precision=fp16",), ("model.quantization=nf4",), ("model.quantization=int8",)]
)
def test_packed_trials_equal_solo_ones_to_rounding_on_a_gpu(tiny_llama, monkeypatch, more):
    monkeypatch.setattr(pace, "overhead", lambda *a: float("inf"))
    keys = ("train.device=cuda", "train.max_steps=1", *more)
    specs = [spec_of("causal_lm", tiny_llama, *one, *keys) for one in ((), PLAIN, DROPPED)]
    work = workload("causal_lm", tiny_llama)
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
    found = run(trainer(spec, workload("causal_lm", tiny_llama)), [engine.Job(0, spec)], 1)[0]
    assert found.state == "COMPLETE" and found.losses[-1] < found.losses[0]


@pytest.mark.gpu
@needs_a_gpu
def test_peak_of_a_gpu_is_that_of_its_tensor_cores():
    assert peak.matmul_peak(torch.device("cuda", 0), torch.bfloat16) > 1e13

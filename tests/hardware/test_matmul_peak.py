"""Arithmetic of a step against the device's matmul: the count by hand, and bounds that no machine leaves."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.hardware import matmul_peak
from lorasweep.lora import adapter
from lorasweep.models import base_model


def counted(tiny_llama, *overrides) -> tuple[int, int]:
    """Return our FLOPs a token, and those that torch counts in the linear layers of a forward and backward pass."""
    spec = compose.compose_trial([f"model.pretrained={tiny_llama}", "task_type=causal_lm", "lora.r=2", *overrides])
    task = tasks.make(spec.task_type)
    base = base_model.load(spec.model, spec.train, task, base_model.load_tokenizer(spec.model))
    attached = adapter.attach(base, spec.lora, spec.task_type, 0)
    ours = matmul_peak.flops_a_token(base.model)
    tokens = 20
    with FlopCounterMode(display=False) as counter:
        attached.peft_model(input_ids=torch.ones(2, tokens // 2, dtype=torch.long)).logits.sum().backward()
    found = counter.get_flop_counts()["Global"]
    head = 4 * base.model.get_output_embeddings().weight.numel()
    return ours, sum(found.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm)) // tokens - head


@pytest.mark.parametrize(
    ("overrides", "slack"),
    [
        ((), 0.1),  # k and v of the first layer have no gradient towards their input either
        (("lora.layers_to_transform=[1]",), 0.1),
        (("lora.target_modules=[down_proj]", "lora.layers_to_transform=[1]"), 0.02),
    ],
)
def test_count_is_that_of_torch(tiny_llama, overrides, slack):
    ours, theirs = counted(tiny_llama, *overrides)
    assert theirs <= ours <= theirs * (1 + slack)


def test_share_grows_with_tokens_and_falls_with_time():
    layer = nn.Linear(6, 4)
    one = matmul_peak.rate(64, tokens=1000, seconds=1.0)
    assert one == 64_000 and matmul_peak.rate(64, tokens=2000, seconds=4.0) == one / 2
    assert matmul_peak.rate(64, tokens=0, seconds=0.0) == matmul_peak.share(layer, 0.0) == 0.0
    assert 0 < matmul_peak.share(layer, one) < 1 and matmul_peak.share(layer, 2 * one) == pytest.approx(
        2 * matmul_peak.share(layer, one)
    )


def test_throughput_is_a_mean_over_the_last_seconds_of_all_trials():
    lately = matmul_peak.Throughput()
    assert str(lately) == ""
    for _ in range(100):
        lately.took(tokens=50, flops=500, seconds=1.0)
    for _ in range(20):
        lately.took(tokens=1000, flops=4000, seconds=1.0)
    assert str(lately) == "1,000 tokens/s"
    lately.peak = 8000.0
    assert str(lately) == "1,000 tokens/s, 50% of the matmul peak"


def test_peak_is_measured_once_and_is_that_of_a_real_machine():
    found = matmul_peak.matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < found < 1e15
    assert matmul_peak.matmul_peak(torch.device("cpu"), torch.float32) == found

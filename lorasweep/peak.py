"""How well a trial uses its device: the arithmetic of its linear layers against what the device's matmul reaches."""

import functools
import time
from typing import Any

import torch
from torch import nn

from lorasweep import quant

SIZE = 1024
"""Rows and columns of the measured product on a CPU; four times as many on an accelerator."""

TRIES = 5


@functools.cache
def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, the fastest of a few; measured once a process."""
    size = SIZE if device.type == "cpu" else 4 * SIZE
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(TRIES + 1):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times)


def flops_a_token(model: Any, trained: int) -> int:
    """Return the FLOPs that a token costs in a step: 4 a frozen weight of a linear layer (forward, and the gradient
    towards its input), 6 a trained one (and its own gradient). The output head and attention's products are left out.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    frozen = {
        m.weight: quant.size(m)
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad
    }
    return 4 * sum(frozen.values()) + 6 * trained


def rate(model: Any, trained: int, tokens: int, seconds: float) -> float:
    """Return the FLOP/s that a trial reached on its tokens, padding not counted; 0 without a step."""
    return tokens * flops_a_token(model, trained) / seconds if seconds else 0.0


def share(model: Any, trained: int, tokens: int, seconds: float) -> float:
    """Return the share of the matmul peak that a trial reached on its tokens, padding not counted; 0 without a step.

    The peak is that of the base's number format, on the device of its first weight.
    """
    reached = rate(model, trained, tokens, seconds)
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return reached / matmul_peak(parameter.device, parameter.dtype) if reached else 0.0

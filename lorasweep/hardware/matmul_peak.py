"""How well a trial uses its device: the arithmetic of its linear layers against what the device's matmul reaches."""

import functools
import time
from collections import deque
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

SIZE = 1024
"""Rows and columns of the measured product on a CPU; four times as many on an accelerator."""

SMALL = 256
"""The same where a product of SIZE would take too long: half precision on some processors."""

LONG_S = 0.3
"""Seconds that are too long for a product."""

TRIES = 5


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square matrix product, the fastest of a few; measured once a process, on a CPU once for
    each number of threads.
    """
    return _measured(device, dtype, torch.get_num_threads() if device.type == "cpu" else 0)


@functools.cache
def _measured(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    size = SIZE if device.type == "cpu" else 4 * SIZE
    half = device.type == "cpu" and dtype != torch.float32
    if half and _product_s(device, dtype, SMALL, 1) * (SIZE / SMALL) ** 3 > LONG_S:
        size = SMALL
    return 2 * size**3 / _product_s(device, dtype, size, TRIES)


def _product_s(device: torch.device, dtype: torch.dtype, size: int, tries: int) -> float:
    """Return the seconds of the fastest of some products and one before them."""
    a, b = (torch.rand(size, size, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    times = []
    for _ in range(tries + 1):
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.get_device_module(device).synchronize()
        times.append(time.perf_counter() - began)
    return min(times)


NOTABLE = 2
"""How many times slower than fp32 a format must be before the user is warned."""


def slow(device: torch.device, dtype: torch.dtype) -> str:
    """Say how much slower a CPU multiplies in a number format than in fp32, if so."""
    if device.type != "cpu" or dtype == torch.float32:
        return ""
    times = matmul_peak(device, torch.float32) / matmul_peak(device, dtype)
    name = str(dtype).removeprefix("torch.")
    return f"products in {name} take {times:.0f} times as long as in float32 on this CPU" if times >= NOTABLE else ""


WINDOW_S = 10.0
"""Seconds of training that a throughput is a mean over."""


class Throughput:
    """What all trials of a worker do a second, lately, while they train."""

    def __init__(self) -> None:
        self.peak = 0.0
        """FLOP/s of the device's matmul; 0 while it is not known."""
        self._steps: deque[tuple[int, int, float]] = deque()
        self._sums = [0.0, 0.0, 0.0]

    def took(self, tokens: int, flops: int, seconds: float) -> None:
        """Take in a step: its tokens, FLOPs, and its share of the seconds."""
        self._add((tokens, flops, seconds), 1)
        self._steps.append((tokens, flops, seconds))
        while len(self._steps) > 1 and self._sums[2] > WINDOW_S:
            self._add(self._steps.popleft(), -1)

    def _add(self, step: tuple[int, int, float], sign: int) -> None:
        self._sums = [total + sign * part for total, part in zip(self._sums, step, strict=True)]

    def __str__(self) -> str:
        tokens, flops, seconds = self._sums
        if not self._steps or seconds <= 0:
            return ""
        share = f", {flops / seconds / self.peak:.0%} of the matmul peak" if self.peak else ""
        return f"{tokens / seconds:,.0f} tokens/s{share}"


def flops_a_token(model: Any, once: Collection[nn.Module] = ()) -> int:
    """Return the FLOPs that a token costs in a step of the trial whose adapter is on the model: 2 a weight of a linear
    layer (forward), 2 more from the first module on that trains (the gradient towards its input), and 2 more where it
    trains itself. Modules count in their own order. The output head, attention's products and what is computed `once`
    a text are left out.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    total, behind, seen = 0, False, set()
    for module in model.modules():
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        if isinstance(module, nn.Linear) and module is not head and module.weight not in seen and module not in once:
            seen.add(module.weight)
            total += module.in_features * module.out_features * (6 if trains else 4 if behind else 2)
        behind = behind or trains
    return total


def rate(flops: int, tokens: int, seconds: float) -> float:
    """Return the FLOP/s of a trial from its FLOPs per token, padding not counted; 0 before the first step."""
    return tokens * flops / seconds if seconds else 0.0


def share(model: Any, reached: float) -> float:
    """Return these FLOP/s as a share of the matmul peak."""
    return reached / peak_of(model) if reached else 0.0


def peak_of(model: Any) -> float:
    """Return the matmul peak in FLOP/s, in the base's number format, on the device of its first weight."""
    parameter = next(p for p in model.parameters() if p.is_floating_point())
    return matmul_peak(parameter.device, parameter.dtype)

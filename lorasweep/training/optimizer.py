"""A trial's trained tensors as parts of a few long ones, and AdamW on those: one step, norm and clearing for all."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.spec import TrainSpec, TrialSpec


def adamw(name: str) -> type[torch.optim.Optimizer]:
    """Return bitsandbytes' AdamW that train.optimizer names."""
    import bitsandbytes.optim as bnb

    return {"adamw_8bit": bnb.AdamW8bit, "paged_adamw": bnb.PagedAdamW32bit, "paged_adamw_8bit": bnb.PagedAdamW8bit}[
        name
    ]


def learning_rate(train: TrainSpec, peak: float, step: int, total: int) -> float:
    """Return the rate of the 0-based `step`, as transformers' schedules have it; `peak` is the highest."""
    warm = math.ceil(total * train.warmup_ratio)
    if step < warm:
        return peak * step / max(1, warm)
    if train.lr_scheduler_type == "constant":
        return peak
    done = (step - warm) / max(1, total - warm)
    if train.lr_scheduler_type == "cosine":
        return peak * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    return peak * max(0.0, 1 - done)


ALIGNED = 16
"""Elements: each tensor begins at a multiple of it, as matrix products like it."""

CLIP_EPSILON = 1e-6
"""What torch adds to a norm that it divides by."""


class Flats:
    """An optimiser of long tensors. The gradients stay in place from step to step: zero where nothing came."""

    param_groups: list[dict[str, Any]]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for grad in self._grads():
            grad.zero_()

    def flats(self) -> list[nn.Parameter]:
        return list(itertools.chain.from_iterable(group["params"] for group in self.param_groups))

    def _grads(self) -> list[Tensor]:
        return [p.grad for p in self.flats() if p.grad is not None]

    def norm(self) -> Tensor:
        """Return the gradient's norm, one number that is still on its device."""
        return torch.nn.utils.get_total_norm(self._grads())

    def clip(self, norm: float, limit: float) -> None:
        """Scale a gradient of this norm to one of at most `limit`, as torch.nn.utils.clip_grad_norm_ does."""
        factor = limit / (norm + CLIP_EPSILON)
        if factor < 1:
            for grad in self._grads():
                grad.mul_(factor)


class FlatAdamW(Flats, torch.optim.AdamW):
    """torch's, with fp32 moments."""


def norms(optimizers: Sequence[Flats]) -> list[float]:
    """Return the norm of each one's gradient, having waited for the device once."""
    found = [one.norm() for one in optimizers]
    return torch.stack([norm.to(found[0]) for norm in found]).tolist() if found else []


def optimizer(named: Mapping[str, nn.Parameter], spec: TrialSpec) -> Any:
    """Return AdamW over what trains: vectors without weight decay, and B faster than A with LoRA+. Each step brings its
    learning rate.

    The parameters keep shapes and values; their storage, and that of their gradients, becomes a part of a long one.
    """
    train, faster = spec.train, spec.lora.loraplus_lr_ratio
    sorted_out: dict[tuple[float, float, torch.device, torch.dtype], list[nn.Parameter]] = {}
    for name, p in named.items():
        decay = train.weight_decay if p.dim() > 1 else 0.0
        ratio = faster if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        sorted_out.setdefault((decay, ratio, p.device, p.dtype), []).append(p)
    by_rank = {p for name, p in named.items() if name.endswith("lora_B.default.weight") and p.dim() == 2}
    groups = [
        {"params": [_flattened(some, by_rank)], "weight_decay": decay, "lr_ratio": ratio}
        for (decay, ratio, *_), some in sorted_out.items()
    ]
    how: dict[str, Any] = {"betas": (train.adam_beta1, train.adam_beta2), "eps": train.adam_epsilon}
    if train.optimizer == "adamw":
        return FlatAdamW(groups, **how, fused=True)
    return type("FlatSmallAdamW", (Flats, adamw(train.optimizer)), {})(groups, **how)


def _flattened(parameters: list[nn.Parameter], by_rank: set[nn.Parameter]) -> nn.Parameter:
    """Return one tensor that holds all of them; they and their gradients look into it and its gradient from now on.

    The matrices of `by_rank`, O x R, lie there as R x O: products with the rank first take no copy so.
    """
    spans = [ALIGNED * math.ceil(p.numel() / ALIGNED) for p in parameters]
    flat = nn.Parameter(parameters[0].new_zeros(sum(spans)))
    flat.grad = torch.zeros_like(flat)
    for p, end, span in zip(parameters, itertools.accumulate(spans), spans, strict=True):
        part = slice(end - span, end - span + p.numel())
        value, grad = (_part(t[part], p.shape, p in by_rank) for t in (flat.detach(), flat.grad))
        p.data, p.grad = value.copy_(p.detach()), grad
    return flat


def _part(values: Tensor, shape: torch.Size, by_rank: bool) -> Tensor:
    return values.view(shape[1], shape[0]).t() if by_rank else values.view(shape)

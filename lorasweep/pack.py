"""The forward pass of LoRA layers, made for training: one fused product a layer, dropout from its own random stream.

peft stays the definition: its layers keep their parameters, and what `LoraForward` computes is what peft's own forward
computes, without the copies. Shapes: N rows times tokens, I inputs, O outputs, R rank.
"""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

LEVELS = 2**16
"""Dropout probabilities are rounded to this many levels."""


def mixed(*numbers: int) -> int:
    """Return a 32-bit seed made of all numbers; torch's CPU generator ignores the higher bits of its seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest())


@dataclass
class DropoutStream:
    """Random numbers of one trial's dropout. They depend on its seed and its step alone."""

    device: torch.device
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator(self.device)

    def at(self, seed: int, step: int) -> None:
        """Begin the stream of one optimiser step."""
        self.generator.manual_seed(mixed(seed, step))

    def keep(self, like: Tensor, p: float) -> Tensor:
        """Return a boolean mask of `like`'s shape that is true with probability 1 - p.

        Four 16-bit draws come from one 64-bit number: a third of the time of one draw an element.
        """
        count = like.numel()
        bits = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
        bits.random_(-(2**63), None, generator=self.generator)
        return (bits.view(torch.int16)[:count] >= round(p * LEVELS) - LEVELS // 2).view(like.shape)


class StreamDropout(nn.Module):
    """Dropout whose mask comes from a DropoutStream; peft's layers call it in place of nn.Dropout."""

    def __init__(self, p: float, stream: DropoutStream) -> None:
        super().__init__()
        self.p = p
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * self.stream.keep(x, self.p) / (1 - self.p)


class LoraForward(torch.autograd.Function):
    """`x W^T + b + s (x * keep) A^T B^T`, W and b frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_OI: Tensor, b_O: Tensor | None, A_RI: Tensor, B_OR: Tensor, s: float, keep: Tensor | None
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        kept_NI = x_NI if keep is None else x_NI * keep.view_as(x_NI)
        y_NO = nn.functional.linear(x_NI, W_OI, b_O)
        low_NR = kept_NI @ A_RI.t()
        y_NO.addmm_(low_NR, B_OR.t(), alpha=s)
        ctx.save_for_backward(kept_NI, low_NR, W_OI, A_RI, B_OR, keep)
        ctx.s = s
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        kept_NI, low_NR, W_OI, A_RI, B_OR, keep = ctx.saved_tensors
        slope_NO = slope.reshape(-1, slope.shape[-1])
        low_slope_NR = (slope_NO @ B_OR).mul_(ctx.s)
        grad_A = low_slope_NR.t() @ kept_NI
        grad_B = (slope_NO.t() @ low_NR).mul_(ctx.s)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_NI = slope_NO @ W_OI
            if keep is None:
                grad_NI.addmm_(low_slope_NR, A_RI)
            else:
                grad_NI.addcmul_(low_slope_NR @ A_RI, keep.view_as(grad_NI))
            grad_x = grad_NI.view(*slope.shape[:-1], -1)
        return grad_x, None, None, grad_A, grad_B, None, None


def install(peft_model: Any, stream: DropoutStream) -> None:
    """Give the model's plain LoRA layers the fused forward and all of its adapters' dropout the stream."""
    for layer in _lora_layers(peft_model):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = StreamDropout(dropout.p, stream)
        if _is_plain(layer):
            layer.forward = functools.partial(_forward, layer)


def uninstall(peft_model: Any) -> None:
    """Give the layers peft's forward back."""
    for layer in _lora_layers(peft_model):
        layer.__dict__.pop("forward", None)


def train(peft_model: Any, on: bool) -> None:
    """Switch the adapters' dropout; the frozen base stays in evaluation mode."""
    for layer in _lora_layers(peft_model):
        layer.lora_dropout.train(on)


def _lora_layers(peft_model: Any) -> Iterator[Any]:
    return (m for m in peft_model.modules() if hasattr(m, "lora_dropout") and hasattr(m, "base_layer"))


def _is_plain(layer: Any) -> bool:
    base = layer.base_layer
    frozen = isinstance(base, nn.Linear) and not any(p.requires_grad for p in base.parameters())
    one = type(layer) is LoraLinear and len(layer.lora_A) == 1
    return frozen and one and type(base) is nn.Linear and not layer.lora_variant and not any(layer.lora_bias.values())


def _forward(layer: Any, x: Tensor) -> Tensor:
    base = layer.base_layer
    if layer.disable_adapters or layer.merged:
        return base(x)
    (name,) = layer.lora_A.keys()
    A_RI, B_OR = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout, s = layer.lora_dropout[name], layer.scaling[name]
    keep = None
    if dropout.training and isinstance(dropout, StreamDropout):
        keep = dropout.stream.keep(x, dropout.p)
        s = s / (1 - dropout.p)
    return LoraForward.apply(x, base.weight, base.bias, A_RI.to(x.dtype), B_OR.to(x.dtype), s, keep)

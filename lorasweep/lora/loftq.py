"""LoftQ: adapters that start from the rounding error of a quantised base. Shapes: I inputs, O outputs, R rank."""

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorasweep.config.spec import LoraSpec
from lorasweep.models.quantization import BITS, read_4_bits, reader


def problems(lora: LoraSpec, quantization: str) -> list[str]:
    """Return what the LoRA keys ask for that a quantised base cannot do."""
    if quantization == "none":
        return []
    out, init = [], lora.init_lora_weights
    if lora.changes_base:
        out.append(
            f"lora.init_lora_weights: {init} takes the adapter's start out of the base weights, which "
            f"model.quantization={quantization} rounds anew; use loftq, or model.quantization=none"
        )
    if init == "orthogonal":
        out.append(
            "lora.init_lora_weights: peft draws orthogonal in the weights' number format, and quantised ones are whole "
            "numbers; use true or gaussian, or model.quantization=none"
        )
    if init == "loftq" and lora.loftq_bits != BITS[quantization]:
        out.append(
            f"lora.loftq_bits: must be {BITS[quantization]} with model.quantization={quantization}, got "
            f"{lora.loftq_bits}; it makes up for the base's own rounding"
        )
    if init == "loftq" and lora.loftq_iter > 1:
        out.append(
            f"lora.loftq_iter: must be 1 with model.quantization={quantization}, got {lora.loftq_iter}; more rounds "
            "would quantise a base for each trial, and trials share one"
        )
    return out


# --- LoftQ -----------------------------------------------------------------------------------------------------------


def init_loftq(layer: Any, lora: LoraSpec) -> None:
    """Quantise the adapted base weight and set s B A to what that lost: LoftQ on any device, at any lora_alpha.

    Alternates, loftq_iter times, W_q = quantised(W - s B A) and s B A = the rank-r part of W - W_q.
    """
    weight = layer.get_base_layer().weight
    exact_OI = _output_first(layer, weight.detach().float())
    update_OI = torch.zeros_like(exact_OI)
    for _ in range(lora.loftq_iter):
        coarse_OI = rounded(exact_OI - update_OI, lora.loftq_bits)
        update_OI = _set_factors(layer, exact_OI - coarse_OI)
    weight.data = _output_first(layer, coarse_OI).to(weight.dtype).contiguous()


def make_up(layer: Any, exact: Tensor) -> None:
    """Set s B A to the rank-r part of what a quantised layer lost of its `exact` weight; the layer stays as it is.

    bitsandbytes keeps the weight of GPT-2's Conv1D output first, as of any linear layer; `exact` is as the checkpoint
    has it.
    """
    base_layer = layer.get_base_layer()
    coarse_OI = reader(base_layer)(torch.float32)
    is_turned = getattr(base_layer, "source_cls", None) is Conv1D
    exact_OI = (exact.T if is_turned else exact).to(coarse_OI)
    _set_factors(layer, exact_OI - coarse_OI)


def _output_first(layer: Any, weight: Tensor) -> Tensor:
    """Return the weight as [O, I], or back again: GPT-2's Conv1D keeps it as [I, O]."""
    return weight.T if isinstance(layer.get_base_layer(), Conv1D) else weight


def _set_factors(layer: Any, lost_OI: Tensor) -> Tensor:
    """Let s B A be the best approximation of a matrix, and return it; ranks that the matrix does not have are zero."""
    u, values, vt = torch.linalg.svd(lost_OI, full_matrices=False)
    A_RI, B_OR = (layer.lora_A["default"].weight.data.zero_(), layer.lora_B["default"].weight.data.zero_())
    rank = min(len(values), len(A_RI))
    root = values[:rank].sqrt()
    A_RI[:rank] = root[:, None] * vt[:rank]
    B_OR[:, :rank] = u[:, :rank] * root / layer.scaling["default"]
    return layer.scaling["default"] * B_OR.to(lost_OI) @ A_RI.to(lost_OI)


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Return the weight as bitsandbytes stores it in NF4 (blocks of 64) or in int8 (a scale a row), read back."""
    if bits == 8:
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        return (weight / scale).round() * scale
    import bitsandbytes.functional as bnb

    stored, state = bnb.quantize_4bit(weight.contiguous(), quant_type="nf4", blocksize=64, compress_statistics=False)
    return read_4_bits(stored, state)

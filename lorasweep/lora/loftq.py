"""LoftQ: adapters that start from the rounding error of a quantised base. Shapes: I inputs, O outputs, R rank."""

from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorasweep.config.spec import LoraSpec
from lorasweep.lora.peft_names import LoraLayer
from lorasweep.models.base_model import LINEAR, Base
from lorasweep.models.quantization import is_quantised, read_4_bits, reader


def finish(peft_model: Any, lora: LoraSpec, base: Base) -> None:
    """Let each adapter make up for what quantising its layer loses: of a quantised base, against its checkpoint."""
    layers = {n: m for n, m in peft_model.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    linear = {n: m for n, m in layers.items() if isinstance(m.get_base_layer(), LINEAR)}
    exact = base.exact() if base.quantization != "none" else {}
    for name, layer in linear.items():
        if is_quantised(layer.get_base_layer()):
            make_up(layer, exact[f"{name}.weight"])
        elif base.quantization == "none":
            init_loftq(layer, lora)


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

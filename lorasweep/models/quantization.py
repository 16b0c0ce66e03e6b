"""A base kept in 8 or 4 bits: how it is loaded, read back for its products, and what LoftQ makes of it. Owner of
bitsandbytes.

A quantised layer is stored small and multiplied in the number format of its input: its weight is read back for the
product, and again for the gradient towards the input. So one row's output never depends on the other rows, as it would
with LLM.int8()'s outlier columns, and trials can share a pass. Shapes: I inputs, O outputs, N rows times tokens.
"""

import copy
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorasweep.config.spec import ModelSpec, TrialSpec
from lorasweep.errors import ConfigError

BITS = {"nf4": 4, "int8": 8}

BLOCK = 64
"""Numbers that share a scale in NF4."""

Reader = Callable[[torch.dtype], Tensor]
"""Gives a layer's weight [O, I] in a number format."""


def loading(spec: ModelSpec, dtype: torch.dtype, skip: Iterable[str] = ()) -> dict[str, Any]:
    """Return arguments for transformers' loaders; {} without quantisation. Modules of `skip` stay as they are.

    Raises ConfigError where bitsandbytes is not installed.
    """
    if spec.quantization == "none":
        return {}
    if not _is_there():
        raise ConfigError([_missing("model.quantization", spec.quantization)])
    bits: dict[str, Any] = {"load_in_8bit": True}
    if spec.quantization == "nf4":
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_use_double_quant": spec.double_quant,
        }
    names = sorted(skip) or None
    return {"quantization_config": transformers.BitsAndBytesConfig(**bits, llm_int8_skip_modules=names)}


def _is_there() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _missing(key: str, value: str) -> str:
    return f"{key}: {value} needs bitsandbytes; run `pip install lorasweep[quant]`"


def lacking(spec: TrialSpec, device: torch.device) -> list[str]:
    """Return what a trial asks of bitsandbytes that this machine or the device does not have."""
    kind, init, optimizer = spec.model.quantization, spec.lora.init, spec.train.optimizer
    asked = {
        "model.quantization": kind if kind != "none" else "",
        "lora.init_lora_weights": init.name if kind == "none" and init.needs_bitsandbytes(spec.lora) else "",
        "train.optimizer": optimizer if optimizer != "adamw" else "",
    }
    out = [_missing(key, value) for key, value in asked.items() if value and not _is_there()]
    if optimizer.startswith("paged") and device.type != "cuda":
        rule = f"{optimizer} pages GPU memory, there is none on the {device.type}"
        out.append(f"train.optimizer: {rule}; use adamw or adamw_8bit")
    return out


def left_out(model: Any) -> set[str]:
    """Return the names of what transformers never quantises: the output head and what is tied to the word vectors."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return {n.removesuffix(".bias") for n in get_keys_to_not_convert(model)}


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def is_linear(module: nn.Module) -> bool:
    """Tell whether a module is x W^T + b and nothing else, W quantised or not."""
    return type(module) is nn.Linear or is_quantised(module)


def size(layer: Any) -> int:
    """Return how many numbers a linear layer's weight stands for, however they are stored."""
    return layer.in_features * layer.out_features


def kept_bytes(layer: nn.Module, spec: ModelSpec) -> float:
    """Return what a layer's weight will take: numbers and a scale a row, or a block of 64 (in 8 bits if doubled)."""
    weight = layer.get_parameter("weight")
    if spec.quantization == "int8":
        return weight.numel() + 4 * weight.shape[0]
    return weight.numel() * (4 + ((8 + 32 / 256) / 64 if spec.double_quant else 32 / 64)) / 8


def read_bytes(layer: nn.Module, spec: ModelSpec) -> int:
    """Return what reading a layer's weight back takes at its highest moment, the layer being in its full format."""
    weight = layer.get_parameter("weight")
    exact = 0 if spec.quantization == "nf4" or weight.element_size() == 4 else 4 * weight.numel()
    return weight.nbytes + exact  # 8 bits are multiplied by their scales in fp32


def quantised(model: nn.Module) -> dict[str, nn.Module]:
    """Return the quantised layers by name."""
    return {name: module for name, module in model.named_modules() if is_quantised(module)}


def reader(layer: nn.Module) -> Reader:
    """Return a function that gives the layer's present weight, read back where it is quantised."""
    weight = layer.get_parameter("weight")
    if not is_quantised(layer):
        return lambda dtype: weight
    if hasattr(weight, "quant_state"):
        return functools.partial(_from_4_bits, weight)
    return functools.partial(_from_8_bits, weight)


def _from_4_bits(weight: Any, dtype: torch.dtype) -> Tensor:
    return read_4_bits(weight.data, weight.quant_state).to(dtype)


def read_4_bits(stored: Tensor, state: Any) -> Tensor:
    """Return the weight in the format that it had, read a block a row: bitsandbytes 0.50 reads wrong scales on a CPU
    where the rows of a matrix are no whole number of blocks.
    """
    from bitsandbytes.functional import dequantize_4bit

    shape, size = state.shape, state.blocksize
    if shape.numel() % size:
        return dequantize_4bit(stored, state)
    blocks = copy.copy(state)
    blocks.shape = torch.Size((shape.numel() // size, size))
    return dequantize_4bit(stored, blocks).view(shape)


@functools.cache
def misreads(width: int) -> bool:
    """Tell whether bitsandbytes' own reading of NF4 rows this wide is not what they stand for, on this CPU."""
    if width % BLOCK == 0 or not _is_there():
        return False
    import bitsandbytes.functional as bnb

    rows = torch.linspace(0.1, 2, BLOCK)[:, None]  # blocks whose scales differ
    exact = rows * torch.linspace(-1, 1, width)
    stored, state = bnb.quantize_4bit(exact, quant_type="nf4", blocksize=BLOCK, compress_statistics=False)
    return not torch.allclose(bnb.dequantize_4bit(stored, state), read_4_bits(stored, state), rtol=1e-3)


def _from_8_bits(weight: Any, dtype: torch.dtype) -> Tensor:
    """Return whole numbers from -127 to 127 times the scale of their row."""
    return (weight.data * (weight.SCB / 127)[:, None]).to(dtype)


class FrozenLinear(torch.autograd.Function):
    """`x W^T + b` of a frozen layer; the weight that was read back is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Reader, b_O: Tensor | None) -> Tensor:
        ctx.read = read
        return nn.functional.linear(x, read(x.dtype), b_O)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        slope_of_b = slope.reshape(-1, slope.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return (slope @ ctx.read(slope.dtype) if ctx.needs_input_grad[0] else None), None, slope_of_b


def _forward(layer: Any, x: Tensor) -> Tensor:
    bias = layer.bias
    return FrozenLinear.apply(x, reader(layer), None if bias is None else bias.to(x.dtype))


def install(model: nn.Module) -> None:
    """Give the quantised layers a forward that treats each row by itself."""
    for layer in quantised(model).values():
        layer.forward = functools.partial(_forward, layer)


def read_back(model: nn.Module) -> None:
    """Put ordinary layers with the very weights that the quantised ones stand for in their places."""
    for name, layer in quantised(model).items():
        read, bias = reader(layer), layer._parameters["bias"]
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        weight_OI = read(dtype)
        plain: Any
        if getattr(layer, "source_cls", None) is Conv1D:  # GPT-2's, which keeps its weight as [I, O]
            plain = Conv1D(layer.out_features, layer.in_features)
            plain.weight = nn.Parameter(weight_OI.T.contiguous(), requires_grad=False)
        else:
            plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")  # type: ignore[arg-type]
            plain.weight = nn.Parameter(weight_OI, requires_grad=False)
        plain.bias = bias
        model.set_submodule(name, plain)
    config: Any = model.config
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        config.__dict__.pop(mark, None)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit", "hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)

"""A model's layers: those that run one after the other, which of them depend on what, and what a model answers."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.config.spec import TrialSpec

NEAR = {torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest relative difference of two answers that are the same but for rounding; 1e-3 in single precision."""

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Stack:
    """The layers of a model that run one after the other."""

    layers: list[nn.Module]
    place: dict[nn.Module, int]
    """Module -> the layers that do not depend on it; a module that is not here may be needed by all."""
    holders: list[nn.Module]
    """Modules that the layers lie in: they are given the token ids."""
    more: bool
    """Whether a layer returns a tuple, of which the hidden states are the first."""
    token_bytes: int
    """Of a token's hidden states."""

    def unchanged(self, changed: Collection[nn.Module]) -> int:
        """Return how many of the first layers depend on none of these modules."""
        return min((self.place.get(m, 0) for m in changed), default=len(self.layers))


def outermost(model: Any) -> list[nn.Module]:
    """Return what looks like the layers of the model, or of its encoder: the longest list in no other list."""
    holder = model.get_encoder() if model.config.is_encoder_decoder else model
    lists: list[Any] = [m for m in holder.modules() if isinstance(m, nn.ModuleList)]
    inner = {m for one in lists for m in one.modules() if m is not one}
    found: list[list[nn.Module]] = [[*m] for m in lists if m not in inner]
    return max(found, key=len, default=[])


@torch.no_grad()
def read(model: Any, inputs: Inputs) -> Stack | None:
    """Return the model's layers, or None where they do not run once each and in order, from hidden states to hidden
    states. `inputs` are equal rows, not as many as tokens; no trial may be on the model.
    """
    layers = outermost(model)
    calls: list[nn.Module] = []
    outputs: list[Any] = []
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(lambda m, _: calls.append(m)).remove)
        for layer in layers:
            undo.callback(layer.register_forward_hook(lambda _, __, out: outputs.append(out)).remove)
        model(**inputs)
    if not layers or [m for m in calls if m in set(layers)] != layers:
        return None
    if not all(isinstance(hidden(o), Tensor) for o in outputs):
        return None
    more = isinstance(outputs[0], tuple)
    shape = hidden(outputs[0]).shape
    good = shape[:2] == inputs["input_ids"].shape and all(isinstance(o, tuple) == more for o in outputs)
    if not good or any(hidden(o).shape != shape for o in outputs):
        return None
    if more and any(isinstance(t, Tensor) and len(t) != 1 for o in outputs for t in o[1:]):
        return None  # what a layer hands on beside its hidden states is another for each row
    place: dict[nn.Module, int] = dict.fromkeys(calls[: calls.index(layers[0])], 0)
    for i, layer in enumerate(layers):
        for module in layer.modules():
            place.setdefault(module, i)
    for module in calls[calls.index(layers[-1]) :]:
        place.setdefault(module, len(layers))
    last = hidden(outputs[-1])
    return Stack(layers, place, holders(model, layers), more, last.shape[-1] * last.element_size())


def holders(model: Any, layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the modules that the layers lie in."""
    inside = set(layers)
    return [m for m in model.modules() if not isinstance(m, nn.ModuleList) and inside < set(m.modules())]


def hidden(output: Any) -> Any:
    """Return the hidden states that a layer gives; a list of some families' own is given back as it is."""
    return output[0] if isinstance(output, tuple) else output


def is_special(config: Any, modules: Sequence[nn.Module]) -> bool:
    """Tell whether the model is compiled, checkpoints its gradients or gives more than its last states."""
    asked = ("output_hidden_states", "output_attentions", "output_router_logits", "expert_capacity")
    if any(m._compiled_call_impl is not None or getattr(m, "gradient_checkpointing", False) for m in modules):
        return True
    return any(getattr(config, key, None) for key in asked)


def answers(output: Any) -> list[Tensor]:
    """Return the numbers that a model gives."""
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]


def near(a: Tensor, b: Tensor) -> bool:
    """Tell whether two answers differ by no more than rounding."""
    return bool((a - b).norm() <= NEAR.get(a.dtype, 1e-3) * a.norm())


def wanted(spec: TrialSpec) -> bool:
    """Tell whether a trial lets states be kept, whatever it adapts."""
    train = spec.train
    return bool(train.prefix_cache_gib) and not spec.model.base_dropout and not train.deterministic


def bytes_a_token(model: Any, changed: Collection[nn.Module], inputs: Inputs) -> int:
    """Return what is kept of a token where trials change these modules, 0 where nothing is; the model may be on the
    meta device.
    """
    layers = outermost(model)
    if not layers or set(changed) & set(layers[0].modules()) or is_special(model.config, layers):
        return 0
    found = read(model, {**rows(inputs), **_without_cache(model)})
    return found.token_bytes if found is not None and found.unchanged(changed) else 0


def _without_cache(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def is_decoders(name: str) -> bool:
    return name.startswith("decoder_")


def _row(inputs: Inputs, times: int) -> dict[str, Tensor]:
    """Return the first row without its padding, repeated."""
    mask_BT = inputs.get("attention_mask")
    length = int(mask_BT[0].sum()) if mask_BT is not None else inputs["input_ids"].shape[1]
    return {k: (v[:1] if is_decoders(k) else v[:1, :length]).repeat(times, 1) for k, v in inputs.items()}


def rows(inputs: Inputs) -> dict[str, Tensor]:
    """Return the first row without its padding a few times: not as often as it has tokens, so that layers which see
    the tokens first show it.
    """
    one = _row(inputs, 1)
    return _row(one, 3 if one["input_ids"].shape[1] == 2 else 2)

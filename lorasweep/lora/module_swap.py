"""What a trial puts in place of the base's modules and parameters: on the base while it is at work, else beside it.

To put it on or take it off moves references only. The base's own weights are never written to.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LOW = (torch.bfloat16, torch.float16)
"""Number formats in which nothing is trained: what trains is kept in fp32 and rounded for each pass."""

Children = dict[nn.Module, dict[str, nn.Module | None]]


@dataclass(frozen=True)
class Place:
    """A module of the base, and what stands in its place."""

    parent: nn.Module
    key: str
    base: nn.Module
    own: nn.Module


@dataclass
class Weight:
    """A parameter of one of the base's modules, and what stands in its place."""

    module: nn.Module
    key: str
    base: nn.Parameter
    own: nn.Parameter
    make: Callable[[], Tensor] | None = None
    """Gives own's values: they need not be kept while it is off."""
    forward: Any = field(default=None, init=False)
    """The module's forward of its own, where `own` is kept in another number format than the base computes in."""

    def put_on(self) -> None:
        if self.make is not None:
            self.own.data = self.make()
        self.module._parameters[self.key] = self.own
        if self.own.dtype != self.base.dtype:
            self.forward = self.module.__dict__.get("forward")
            compute_in(self.base.dtype, self.module)

    def take_off(self) -> None:
        self.module._parameters[self.key] = self.base
        if self.own.dtype != self.base.dtype:
            give_back(self.module, self.forward)
        if self.make is not None:
            self.own.data = self.own.new_empty(0)


@dataclass
class Swap:
    """The places and weights of one trial; made while it is on the base."""

    places: list[Place]
    weights: list[Weight]
    is_on: bool = field(default=True, init=False)

    def put_on(self) -> None:
        """Take the base's places. No other trial may be on the base."""
        if not self.is_on:
            for place in self.places:
                place.parent._modules[place.key] = place.own
            for weight in self.weights:
                weight.put_on()
            self.is_on = True

    def take_off(self) -> None:
        """Leave the base as it was."""
        if self.is_on:
            for place in self.places:
                place.parent._modules[place.key] = place.base
            for weight in self.weights:
                weight.take_off()
            self.is_on = False


def children(model: nn.Module) -> Children:
    """Return what each module of the model holds, to be compared with later."""
    return {module: dict(module._modules) for module in model.modules()}


def restore(before: Children) -> None:
    """Give every module the children that it had."""
    for parent, held in before.items():
        parent._modules.clear()
        parent._modules.update(held)


def places(before: Children) -> list[Place]:
    """Return where other modules stand now."""
    found = []
    for parent, held in before.items():
        for key, base in held.items():
            own = parent._modules[key]
            if base is not None and own is not None and own is not base:
                found.append(Place(parent, key, base, own))
    return found


def own_weights(before: Children, changed: Mapping[nn.Parameter, tuple[Tensor, Tensor]]) -> list[Weight]:
    """Give each changed parameter a twin that holds its present values, and itself the values that it had.

    `changed` maps a parameter to the tensor that it had, which is its own again, and to a copy of that. Where the
    base's modules had it, they have its twin now, in fp32 where it trains.
    """
    twins = {}
    for base, kept_values in changed.items():
        trains = base.requires_grad
        kept = base.detach().float() if trains and base.dtype in LOW else base.detach()
        twins[base] = nn.Parameter(kept.clone(), requires_grad=trains)
        base.requires_grad_(False)
        undone(base, *kept_values)
    out = []
    for module in before:
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in twins:
                out.append(Weight(module, key, parameter, twins[parameter]))
    for weight in out:
        weight.put_on()
    return out


def undone(base: nn.Parameter, exact: Tensor, values: Tensor) -> None:
    """Give a parameter the tensor that it had, with the values that it had."""
    if base.data_ptr() == exact.data_ptr():  # changed in place
        exact.copy_(values)
    base.data = exact


def keep_in_fp32(module: nn.Module) -> None:
    """Let a module that is to train keep its parameters in fp32, and compute in the format that they had."""
    low = [p for p in module.parameters() if p.dtype in LOW]
    if low:
        dtype = low[0].dtype
        for parameter in low:
            parameter.data = parameter.data.float()
        compute_in(dtype, module)


def compute_in(dtype: torch.dtype, module: nn.Module) -> None:
    """Let a module compute with its fp32 parameters rounded to `dtype`; their gradients come back in fp32."""
    module.__dict__["forward"] = functools.partial(_rounded_forward, dtype, module, module.forward)


def _rounded_forward(dtype: torch.dtype, module: nn.Module, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with ExitStack() as undo:
        for inner in module.modules():
            exact = {k: p for k, p in inner._parameters.items() if p is not None and p.dtype == torch.float32}
            undo.enter_context(holding(inner, {k: p.to(dtype) for k, p in exact.items()}))
        return own(*args, **kwargs)


def give_back(module: nn.Module, forward: Any) -> None:
    """Give a module back the forward that stood in its __dict__, None for its class's own."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def aliases(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters once more, in the same memory. torch's parametrizations mark those that they are
    put on as written to, which the graphs of other trials would take for a change.
    """
    return {k: nn.Parameter(p.data, requires_grad=False) for k, p in module._parameters.items() if p is not None}


@contextmanager
def holding(module: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors in place of its parameters."""
    base = {key: module._parameters[key] for key in own}
    try:
        module._parameters.update(own)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(base)

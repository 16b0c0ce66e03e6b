"""What a trial puts in the place of the base's modules and parameters: on the base while it is at work, else beside it.

To put it on or take it off moves references only. The base's own weights are never written to.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

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
                weight.module._parameters[weight.key] = weight.own
                if weight.make is not None:
                    weight.own.data = weight.make()
            self.is_on = True

    def take_off(self) -> None:
        """Leave the base as it was."""
        if self.is_on:
            for place in self.places:
                place.parent._modules[place.key] = place.base
            for weight in self.weights:
                weight.module._parameters[weight.key] = weight.base
                if weight.make is not None:
                    weight.own.data = weight.own.new_empty(0)
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
    return [
        Place(parent, key, base, own)
        for parent, held in before.items()
        for key, base in held.items()
        if base is not None and (own := parent._modules[key]) is not None and own is not base
    ]


def own_weights(before: Children, changed: Mapping[nn.Parameter, Tensor]) -> list[Weight]:
    """Give each changed parameter a twin that holds its present values, and itself the values that it had.

    `changed` maps a parameter to its values of before. Where the base's modules had it, they have its twin now.
    """
    twins = {}
    for base, values in changed.items():
        twins[base] = nn.Parameter(base.detach().clone(), requires_grad=base.requires_grad)
        base.requires_grad_(False)
        base.data = values
    out = []
    for module in before:
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter in twins:
                out.append(Weight(module, key, parameter, twins[parameter]))
    for weight in out:
        weight.module._parameters[weight.key] = weight.own
    return out


@contextmanager
def holding(module: nn.Module, own: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a module compute with other tensors in the place of its own parameters."""
    base = {key: module._parameters[key] for key in own}
    try:
        module._parameters.update(own)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(base)

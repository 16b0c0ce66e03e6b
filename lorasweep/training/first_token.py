"""Where a classifier reads nothing but the first token of its encoder's last layer, what follows that layer's attention
is computed for the first token alone: other tokens change no answer, and their gradients there are zero.

No model is known by its name: a place is taken where trying shows it. Shapes: B rows, T tokens, D hidden.
"""

import itertools
from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorasweep.lora import module_swap
from lorasweep.models.layer_stack import Inputs, answers, hidden, is_special, near, outermost


@dataclass(frozen=True)
class Place:
    """From where on only the first token counts, in one model."""

    module: nn.Module
    """The first module that reads it alone, other tokens of its inputs being of no use."""
    behind: Collection[nn.Module]
    """It and what is computed after it: once a text, not once a token."""

    def inside(self, modules: Iterable[nn.Module]) -> bool:
        """Tell whether one of these modules holds it: another that computes in its place would not know of it."""
        return any(m is not self.module and self.module in set(m.modules()) for m in modules)

    def once(self, changed: Iterable[module_swap.Place]) -> set[nn.Module]:
        """Return what is computed once a text, an adapter's own modules among it."""
        own = (place.own.modules() for place in changed if place.base in self.behind)
        return {*self.behind, *itertools.chain.from_iterable(own)}

    def used(self) -> RemovableHandle:
        """Show the module the first token alone, while the handle's context lasts."""
        return _given(self.module, _first)


@torch.no_grad()
def find(model: Any, inputs: Inputs) -> Place | None:
    """Return the place, or None where the model has none. `inputs` are unlike texts of at least two tokens, padded, and
    not as many as tokens: on a model whose layers see the tokens first, rows are lost, which shows. No trial may be on
    the model.
    """
    layers = outermost(model)
    if not layers or is_special(model.config, [model, *layers]):
        return None
    last, calls, seen = layers[-1], list[nn.Module](), list[Any]()
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(lambda m, _: calls.append(m)).remove)
        expected = answers(model(**inputs))
    with last.register_forward_hook(lambda _, __, output: _others(output)):
        if not _same(answers(model(**inputs)), expected):
            return None
    inside = set(last.modules())
    for i, module in enumerate(calls):
        if module not in inside or calls.count(module) > 1:
            continue
        with _given(module, _others):
            if not _same(answers(model(**inputs)), expected):
                continue
        with _given(module, _first), last.register_forward_hook(lambda _, __, output: seen.append(hidden(output))):
            try:
                found = answers(model(**inputs))
            except (RuntimeError, ValueError, TypeError, IndexError):  # it counts the tokens elsewhere
                continue
        if [a.shape for a in found] != [a.shape for a in expected]:
            continue
        states = seen[-1] if seen else None  # a list of layers need not be called as layers
        alone = isinstance(states, Tensor) and states.dim() == 3 and states.shape[:2] == (len(inputs["input_ids"]), 1)
        if alone and all(near(a, b) for a, b in zip(expected, found, strict=True)):
            return Place(module, frozenset(calls[i:]))
    return None


def _given(module: nn.Module, change: Callable[[Any], Any]) -> RemovableHandle:
    """Let a module see its inputs changed, while the handle's context lasts."""
    return module.register_forward_pre_hook(lambda _, args, kwargs: (change(args), change(kwargs)), with_kwargs=True)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return arguments or an output with the numbers that are [B, T, D] changed."""
    if isinstance(value, tuple):
        changed = [_each(v, change) for v in value]
        return type(value)(*changed) if hasattr(value, "_fields") else tuple(changed)
    if isinstance(value, dict):
        return {k: _each(v, change) for k, v in value.items()}
    return change(value) if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point() else value


def _first(given: Any) -> Any:
    return _each(given, lambda x_BTD: x_BTD[:, :1])


def _others(given: Any) -> Any:
    """Change all tokens but the first."""
    return _each(given, lambda x_BTD: torch.cat([x_BTD[:, :1], 1 - x_BTD[:, 1:]], dim=1))


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return bool(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

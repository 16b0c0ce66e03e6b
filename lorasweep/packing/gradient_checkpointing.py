"""Layers that keep no more than their inputs: in the backward pass they compute again what it needs, with the same
dropout and for the same trials. A third more time, a fraction of the memory.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lorasweep.config.spec import TrialSpec
from lorasweep.lora.module_swap import give_back
from lorasweep.packing.dropout import DropoutStream
from lorasweep.packing.packed_pass import Pass


def blocks(model: Any) -> list[nn.Module]:
    """Return the layers that can compute again, as transformers marks them; none that lies in another."""
    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner: set[nn.Module] = set()
    for block in found:
        inner.update(m for m in block.modules() if m is not block)
    return [m for m in found if m not in inner]


def problems(spec: TrialSpec, model: Any) -> list[str]:
    """Return why a model cannot checkpoint its gradients, if so."""
    if not spec.train.gradient_checkpointing or blocks(model):
        return []
    return [
        f"train.gradient_checkpointing: {type(model).__name__} marks no layer that can compute again; set it to false, "
        "and train.micro_batch_size smaller"
    ]


@contextmanager
def on(model: Any, streams: Sequence[DropoutStream], shared: Pass | None = None, base: bool = False) -> Iterator[None]:
    """Let the model's layers keep only their inputs. To be left when the backward pass has ended.

    `streams` are those of the trials' dropout; `shared` is the pass they share, which has to be on all the while;
    `base` tells whether the base's dropout is on.
    """
    with ExitStack() as undo:
        for block in blocks(model):
            undo.callback(give_back, block, block.__dict__.get("forward"))
            block.__dict__["forward"] = functools.partial(_forward, block.forward, streams, shared, base)
        yield


def _forward(
    own: Callable[..., Any],
    streams: Sequence[DropoutStream],
    shared: Pass | None,
    base: bool,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    return checkpoint(
        own,
        *args,
        use_reentrant=False,
        preserve_rng_state=base,
        context_fn=lambda: (nullcontext(), _Again(streams, shared)),
        **kwargs,
    )


class _Again:
    """Made when a layer computes: while it computes again, dropout and pass are where they were then."""

    def __init__(self, streams: Sequence[DropoutStream], shared: Pass | None) -> None:
        self._streams, self._shared = streams, shared
        self._then = self._where()
        self._now: Any = None

    def _where(self) -> tuple[list[Any], Any]:
        return [s.state() for s in self._streams], self._shared.place() if self._shared else None

    def _go_to(self, where: tuple[list[Any], Any]) -> None:
        states, place = where
        for stream, state in zip(self._streams, states, strict=True):
            stream.go_to(state)
        if self._shared is not None:
            self._shared.go_to(place)

    def __enter__(self) -> None:
        self._now = self._where()
        self._go_to(self._then)

    def __exit__(self, *_: object) -> None:
        self._go_to(self._now)

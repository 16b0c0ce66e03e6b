"""Dropout masks drawn from a stream per trial, so that a trial draws the same ones alone and beside others."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorasweep.errors import Unpackable
from lorasweep.tasks import batches

LEVELS = 2**16
"""Dropout probabilities are rounded to this many levels."""


class Draws:
    """Random numbers of one device. A CPU's are numpy's: torch needs four times as long for them."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self._device = device
        self._source: Any = None if device.type == "cpu" else torch.Generator(device)
        self.begin(seed)

    def begin(self, seed: int) -> None:
        """Begin the numbers of a seed."""
        if self._device.type == "cpu":
            self._source = np.random.SFC64(seed)
        else:
            self._source.manual_seed(seed)

    def numbers(self, count: int) -> Tensor:
        """Return `count` random int16, all values equally likely.

        Four come from one number of 64 bits: a third of the time of one draw each.
        """
        words = (count + 3) // 4
        if self._device.type == "cpu":
            return torch.from_numpy(self._source.random_raw(words).view(np.int16)[:count])
        bits = torch.empty(words, dtype=torch.int64, device=self._device)
        return bits.random_(-(2**63), None, generator=self._source).view(torch.int16)[:count]

    def state(self) -> Any:
        """Return where in the numbers it is, for `go_to`."""
        return self._source.state if self._device.type == "cpu" else self._source.get_state()

    def go_to(self, state: Any) -> None:
        if self._device.type == "cpu":
            self._source.state = state
        else:
            self._source.set_state(state)


@dataclass
class DropoutStream:
    """Random numbers of one trial's dropout. They depend on its seed and its step alone."""

    device: torch.device
    draws: dict[torch.device, Draws] = field(default_factory=dict)
    """One a device: of a base spread over several, each layer draws on its own."""
    on: bool = False
    """Whether the trial drops anything now, whatever mode its modules are in."""
    _begun: tuple[int, ...] = (0, 0)
    _rows: int = 0
    _lengths: Mapping[int, int] = field(default_factory=dict)
    """Of the trial's texts by themselves, where one of them is shorter than in the batch."""

    def at(self, seed: int, step: int) -> None:
        """Begin the stream of one optimiser step."""
        self._begun = seed, step
        for device, draws in self.draws.items():
            draws.begin(self._seed(device))

    def _seed(self, device: torch.device) -> int:
        return batches.mixed(*self._begun) if device == self.device else batches.mixed(*self._begun, device.index or 0)

    def _of(self, device: torch.device) -> Draws:
        if device not in self.draws:
            self.draws[device] = Draws(device, self._seed(device))
        return self.draws[device]

    def state(self) -> Mapping[torch.device, Any]:
        """Return where in the stream it is, for `go_to`."""
        return {device: draws.state() for device, draws in self.draws.items()}

    def go_to(self, state: Mapping[torch.device, Any]) -> None:
        for device, draws in self.draws.items():
            if device in state:
                draws.go_to(state[device])
            else:  # it had not begun
                draws.begin(self._seed(device))

    @contextmanager
    def padded(self, rows: int, lengths: Mapping[int, int]) -> Iterator[None]:
        """Draw as without padding; `lengths` maps a padded length to that of the trial's rows by themselves."""
        if any(own < padded for padded, own in lengths.items()):
            self._rows, self._lengths = rows, lengths
        try:
            yield
        finally:
            self._rows, self._lengths = 0, {}

    def keep(self, like: Tensor, p: float) -> Tensor:
        """Return a mask of `like`'s shape that is one with probability 1 - p, and one on padding."""
        if not self._lengths or (len(like) == self._rows and like.dim() < 3):
            return self._drawn(like, p)
        each = like.shape[1] if like.dim() > 2 else len(like) // self._rows
        if each not in self._lengths or self._lengths[each] == each:
            if each not in (1, *self._lengths):
                raise Unpackable(f"dropout sees {each} positions, the texts have {sorted(self._lengths)}")
            return self._drawn(like, p)
        block = like.reshape(self._rows, each, *like.shape[2 if like.dim() > 2 else 1 :])
        mask = torch.ones(block.shape, dtype=self.mask_dtype(like), device=like.device)
        mask[:, : self._lengths[each]] = self._drawn(block[:, : self._lengths[each]], p)
        return mask.view(like.shape)

    def mask_dtype(self, like: Tensor) -> torch.dtype:
        """Return what a mask for `like` is kept in: on a CPU a product with booleans takes four times as long."""
        return like.dtype if self.device.type == "cpu" else torch.bool

    def _drawn(self, like: Tensor, p: float) -> Tensor:
        numbers = self._of(like.device).numbers(like.numel()).view(like.shape)
        mask = torch.empty(like.shape, dtype=self.mask_dtype(like), device=like.device)
        return torch.ge(numbers, round(p * LEVELS) - LEVELS // 2, out=mask)


class StreamDropout(nn.Module):
    """Dropout whose mask comes from a DropoutStream; peft's layers call it in place of nn.Dropout."""

    def __init__(self, p: float, stream: DropoutStream) -> None:
        super().__init__()
        self.p = p
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        if not self.stream.on:
            return x
        return x * self.stream.keep(x, self.p) / (1 - self.p)

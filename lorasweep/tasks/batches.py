"""What a trial does at each of its steps: which examples it sees, at which learning rate; and how many steps it has."""

import hashlib
import math
from collections.abc import Iterator, Sequence

import torch

from lorasweep.config.spec import TrainSpec
from lorasweep.tasks.task import Example, lengths_of


def mixed(*numbers: int) -> int:
    """Return a 32-bit seed made of all numbers; torch's CPU generator ignores the higher bits of its seed."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest())


MEGABATCH = 50
"""Batches of similar length are formed within this many batches of random order, as HF's group_by_length does."""


def epochs(examples: Sequence[Example], batch_size: int, seed: int, skip: int = 0) -> Iterator[list[Example]]:
    """Yield batches without end: each epoch holds every example once, in batches of similar length, in random order.

    The first `skip` batches are left out; it costs no more than the order of one epoch.
    """
    lengths = lengths_of(examples)
    first, inside = divmod(skip, math.ceil(len(examples) / batch_size))
    for epoch in range(first, 2**31):
        random = torch.Generator().manual_seed(mixed(seed, epoch))
        order = torch.randperm(len(examples), generator=random).tolist()
        span = batch_size * MEGABATCH
        for start in range(0, len(order), span):
            order[start : start + span] = sorted(order[start : start + span], key=lengths.__getitem__, reverse=True)
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(batches), generator=random).tolist()[inside:]:
            yield [examples[j] for j in batches[i]]
        inside = 0


def step_counts(train: TrainSpec, examples: int) -> tuple[int, int]:
    """Return the optimiser steps an epoch and in all."""
    per_epoch = math.ceil(examples / train.batch_size)
    return per_epoch, math.ceil(per_epoch * train.epochs) if train.max_steps is None else train.max_steps

"""What a trial does at each of its steps: which examples it sees, at which learning rate; and how many steps it has."""

import math
from collections.abc import Iterator, Sequence

import torch

from lorasweep import pack
from lorasweep.spec import TrainSpec
from lorasweep.tasks import Example, lengths_of

MEGABATCH = 50
"""Batches of similar length are formed within this many batches of random order, as HF's group_by_length does."""


def epochs(examples: Sequence[Example], batch_size: int, seed: int, skip: int = 0) -> Iterator[list[Example]]:
    """Yield batches without end: each epoch holds every example once, in batches of similar length, in random order.

    The first `skip` batches are left out; it costs no more than the order of one epoch.
    """
    lengths = lengths_of(examples)
    first, inside = divmod(skip, math.ceil(len(examples) / batch_size))
    for epoch in range(first, 2**31):
        random = torch.Generator().manual_seed(pack.mixed(seed, epoch))
        order = torch.randperm(len(examples), generator=random).tolist()
        span = batch_size * MEGABATCH
        order = [
            i
            for start in range(0, len(order), span)
            for i in sorted(order[start : start + span], key=lengths.__getitem__, reverse=True)
        ]
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(batches), generator=random).tolist()[inside:]:
            yield [examples[j] for j in batches[i]]
        inside = 0


def step_counts(train: TrainSpec, examples: int) -> tuple[int, int]:
    """Return the optimiser steps an epoch and in all."""
    per_epoch = math.ceil(examples / train.batch_size)
    return per_epoch, train.max_steps or math.ceil(per_epoch * train.epochs)


def learning_rate(train: TrainSpec, step: int, total: int) -> float:
    """Return the rate of the 0-based `step`, as transformers' schedules have it."""
    warm = math.ceil(total * train.warmup_ratio)
    if step < warm:
        return train.learning_rate * step / max(1, warm)
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    done = (step - warm) / max(1, total - warm)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))
    return train.learning_rate * max(0.0, 1 - done)

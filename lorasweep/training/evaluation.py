"""A split's predictions: of one trial, or of several in the same passes."""

import contextlib
from collections.abc import Callable, Sequence

import torch

from lorasweep.config.spec import TrainSpec
from lorasweep.tasks.task import Batch, Example, Prediction, Task

Within = Callable[[Batch], contextlib.AbstractContextManager[None]]


def predict(
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Example],
    train: TrainSpec,
    pad_id: int,
    within: Within = lambda _: contextlib.nullcontext(),
) -> list[Prediction]:
    """Return the predictions of all examples in their own order; batches go by length, so that little is padding.

    Each forward pass runs `within` what its batch calls for.
    """
    return predict_for(1, model, task, examples, train, pad_id, within)[0]


@torch.inference_mode()
def predict_for(
    trials: int,
    model: torch.nn.Module,
    task: Task,
    examples: Sequence[Example],
    train: TrainSpec,
    pad_id: int,
    within: Within,
) -> list[list[Prediction]]:
    """Return each trial's predictions, as `predict` does: a pass holds the same examples once for each of them."""
    device = next(model.parameters()).device
    order = sorted(examples, key=len, reverse=True)
    out: list[list[Prediction]] = [[] for _ in range(trials)]
    for start in range(0, len(order), train.eval_batch_size):
        batch = task.collate([order[start : start + train.eval_batch_size]] * trials, pad_id, device)
        with within(batch):
            found = task.predict(model, batch)
        for own, rows in zip(out, batch.groups, strict=True):
            own += found[rows]
    return [sorted(own, key=lambda p: p["row"]) for own in out]

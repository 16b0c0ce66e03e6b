"""The best evaluation of a trial so far, what trained as it was then, and when to wait for a better one no longer.

Better is strictly better, as transformers' load_best_model_at_end has it; patience counts as its EarlyStoppingCallback.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorasweep.training.events import EvalEvent


@dataclass
class Best:
    metric: str
    maximize: bool
    keeps: bool
    """Whether the trial's score and adapter are of it, train.keep=best."""
    patience: int | None
    kept: EvalEvent | None = None
    """None before the first evaluation."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """What trained as it was then, in the machine's memory; empty where it has not changed since."""
    without: int = 0
    """Evaluations since then."""

    def take(self, found: EvalEvent, trained: Mapping[str, Tensor], *, is_last: bool) -> str:
        """Take in an evaluation of `trained`; return why the trial is to end before its last step, or nothing."""
        if self._is_better(found):
            self.kept, self.without = found, 0
            self.tensors = {} if is_last or not self.keeps else _copied(trained, self.tensors)
            return ""
        self.without += self.kept is not None
        if is_last or self.patience is None or self.without < self.patience:
            return ""
        assert self.kept is not None, "what is not better has come after it"
        value, step = self.kept.metrics[self.metric], self.kept.step
        return (
            f"train.patience={self.patience}: no evaluation was better than that of step {step}, "
            f"{self.metric} {value:.4f}"
        )

    def _is_better(self, found: EvalEvent) -> bool:
        if self.kept is None:
            return math.isfinite(found.metrics[self.metric])
        new, old = (e.metrics[self.metric] for e in (found, self.kept))
        return new > old if self.maximize else new < old

    def put_back(self, trained: Mapping[str, Tensor]) -> None:
        """Let what trained be as it was at the best evaluation."""
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                trained[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, but for the evaluation."""
        return {"tensors": dict(self.tensors), "without": self.without}

    def restore(self, saved: Mapping[str, Any], kept: EvalEvent) -> None:
        """Go on from what `state` gave."""
        self.kept, self.tensors, self.without = kept, dict(saved["tensors"]), saved["without"]


def _copied(trained: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies in the machine's memory, in place of earlier ones where they are."""
    out = {}
    for name, tensor in trained.items():
        there = before.get(name)
        out[name] = tensor.detach().to("cpu", copy=True) if there is None else there.copy_(tensor.detach())
    return out

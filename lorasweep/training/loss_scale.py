"""fp16's loss scale: what one trial's loss is multiplied by, so that small gradients do not round to zero.

Each trial has its own, so that none depends on its neighbours. Where a gradient overflows, the step is done again with
half the scale: no step is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

START = 2.0**16
LEAST = 2.0**-6
"""An overflow at this scale is the trial's own: its gradient is infinite."""

GROW_AFTER = 2000
"""Steps without an overflow before the scale doubles; torch's GradScaler waits as long."""


@dataclass
class LossScale:
    value: float = START
    good: int = 0
    """Steps without an overflow, up to now."""

    def unscale(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Divide the gradients by the scale and adapt it; return False where the step has to be done again.

        True with gradients that are not finite means that no scale helps.
        """
        grads = [p.grad for p in parameters if p.grad is not None]
        overflowed = False
        for device in {g.device for g in grads}:
            found = torch.zeros((), device=device)
            there = [g for g in grads if g.device == device]
            torch._amp_foreach_non_finite_check_and_unscale_(there, found, found.new_full((), 1 / self.value))
            overflowed |= bool(found)
        if overflowed and self.value > LEAST:
            self.value, self.good = self.value / 2, 0
            return False
        self.good += 1
        if self.good >= GROW_AFTER:
            self.value, self.good = self.value * 2, 0
        return True

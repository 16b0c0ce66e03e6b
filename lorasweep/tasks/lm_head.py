"""A language model's output head, read where positions are supervised, a chunk at a time.

Shapes: B rows, T tokens, N supervised positions, C of a chunk, D hidden, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.tasks.task import IGNORE

CHUNK_LOGITS = 2**24
"""Logits that exist at once: 64 MiB in fp32, 340 positions of a 49k vocabulary."""

SOME = 2
"""Rows of logits that are looked at to learn what a model does to them."""


@dataclass(frozen=True)
class Change:
    """What a model does to its head's output: s x, or c tanh(s x / c) where there is a cap."""

    scale: float = 1.0
    cap: float = 0.0

    def of(self, logits: Tensor) -> Tensor:
        """Change logits in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits


class Head:
    """Makes the losses of one model at a time. Where a trial changes the head, or the model its output in an unknown
    way, the model's own forward gives all logits.
    """

    def __init__(self) -> None:
        self.change: Change | None = None
        """None where all logits are needed, or nothing was seen yet."""
        self._config: Any = None
        """Of the model that was looked at."""
        self._head: Any = None
        self._around: list[nn.Module] = []
        """Modules that hold the head, the model aside."""

    def losses(self, model: Any, inputs: Mapping[str, Any], targets_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, row and hit of each supervised position, [N] each; position t is scored against target t."""
        keep_BT = targets_BT != IGNORE
        where, targets_N = keep_BT.nonzero()[:, 0], targets_BT[keep_BT]
        head, inputs = model.get_output_embeddings(), {**inputs, "use_cache": False}
        read = is_frozen(head) and not self._is_replaced(model, head)
        if read and (self.change is not None or self._config is not model.config):
            hidden_BTD, raw_B1V, logits_B1V = _one_position(model, head, inputs)
            if self._config is not model.config:
                self._learn(model.config, raw_B1V, logits_B1V)
            if self.change is not None:
                there = head.weight.device  # of a base spread over several, the last layer's may be another
                hidden_ND = hidden_BTD.to(there)[keep_BT.to(there)]
                found = HeadLoss.apply(hidden_ND, head.weight, head.bias, targets_N.to(there), self.change)
                return found[0], where.to(there), found[1]
        logits_NV = model(**inputs).logits[keep_BT].float()
        losses = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
        return losses, where, logits_NV.argmax(-1) == targets_N

    def _is_replaced(self, model: Any, head: nn.Module) -> bool:
        """Tell whether something else computes for a module around the head, as for one that a packed trial saves."""
        if self._head is not head:
            holders = [m for m in model.modules() if m is not model and m is not head]
            self._head, self._around = head, [m for m in holders if head in set(m.modules())]
        return any("forward" in vars(m) for m in self._around)

    def _learn(self, config: Any, raw_B1V: Tensor | None, logits_B1V: Tensor) -> None:
        """Find out what this model does to its head's output; from numbers that say nothing, nothing is learned."""
        self.change = change(config, raw_B1V, logits_B1V)
        telling = raw_B1V is None or raw_B1V.is_meta or bool(raw_B1V.isfinite().all() and raw_B1V.any())
        self._config = config if telling else None


def change(config: Any, raw: Tensor | None, logits: Tensor) -> Change | None:
    """Return what makes a model's logits of its head's output, tried on both; None for something else.

    Numbers come from the config: what is read off the logits would be rounded.
    """
    if raw is logits:
        return Change()
    if raw is None or raw.shape != logits.shape:
        return None
    known = config.get_text_config().to_dict()
    numbers = {k: float(v) for k, v in known.items() if isinstance(v, float | int) and v > 0 and v is not True}
    caps = [v for k, v in numbers.items() if "cap" in k]
    if raw.is_meta:  # nothing to try it on
        named = any("logit" in k or "multiplier" in k for k in numbers)
        return Change(cap=caps[0]) if caps else Change() if named else None
    before, after = (x.detach()[:SOME].cpu().double() for x in (raw, logits))
    if torch.equal(before, after):
        return Change()
    scales = sorted({*numbers.values(), *(1 / v for v in numbers.values())})
    tried = [Change(scale, 0.0) for scale in scales]
    tried += [Change(scale, cap) for cap, scale in product(caps, (1.0, *scales))]
    apart = [float((one.of(before.clone()) - after).norm()) for one in tried]
    nearest = tried[min(range(len(tried)), key=apart.__getitem__)]
    eps = torch.finfo(logits.dtype).eps
    close = torch.allclose(nearest.of(before.clone()), after, rtol=4 * eps, atol=4 * eps * float(after.abs().max()))
    return nearest if close and nearest != Change() else None


def is_frozen(head: Any) -> bool:
    """Tell whether a head is a plain linear layer that no trial changes; packing replaces the forward of others."""
    return (
        type(head) is nn.Linear and "forward" not in vars(head) and not any(p.requires_grad for p in head.parameters())
    )


def _one_position(model: Any, head: nn.Linear, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return what the head reads, [B, T, D], its output and the model's logits, [B, 1, V] each.

    The model runs as always, so that what it does before the head is in; the head itself is shown one position only.
    The output is None where the head is called more often than once, or its output changed in place.
    """
    seen: list[Tensor] = []
    versions: list[int] = []

    def first_position(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0][:, :1], *args[1:])

    def keep(_: nn.Module, __: Any, raw_B1V: Tensor) -> None:
        seen.append(raw_B1V)
        versions.append(0 if raw_B1V.is_inference() else raw_B1V._version)

    hooks = [head.register_forward_pre_hook(first_position), head.register_forward_hook(keep)]
    try:
        logits_B1V = model(**inputs).logits
    finally:
        for hook in hooks:
            hook.remove()
    whole = len(seen) == 2 and (seen[1].is_inference() or seen[1]._version == versions[0])
    return seen[0], seen[1] if whole else None, logits_B1V


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of `hidden W^T + b`, changed as the model does, whose logits exist one chunk at a time.

    W and b are frozen. The gradient towards the hidden states is made in the forward pass, while a chunk's logits are
    there; only that is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, change: Change
    ) -> Any:
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        wants = ctx.needs_input_grad
        grad_ND = torch.empty_like(hidden_ND) if wants[0] else None
        losses_N = torch.empty(
            len(targets_N), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device
        )
        hits_N = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        for i in range(0, len(targets_N), rows):
            part = slice(i, i + rows)
            raw_CV = nn.functional.linear(hidden_ND[part], weight_VD, bias_V).to(losses_N.dtype)
            logits_CV = change.of(raw_CV)
            target_C1 = targets_N[part, None]
            hits_N[part] = logits_CV.argmax(-1) == targets_N[part]
            log_z_C1 = logits_CV.logsumexp(-1, keepdim=True)
            losses_N[part] = (log_z_C1 - logits_CV.gather(1, target_C1))[:, 0]
            if grad_ND is not None:
                bent_CV = 1 - (logits_CV / change.cap).square_() if change.cap else None
                slope_CV = logits_CV.sub_(log_z_C1).exp_()
                slope_CV.scatter_add_(1, target_C1, slope_CV.new_full(target_C1.shape, -1.0))
                if bent_CV is not None:
                    slope_CV.mul_(bent_CV)
                if change.scale != 1:
                    slope_CV.mul_(change.scale)
                grad_ND[part] = slope_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(hits_N)
        return losses_N, hits_N

    @staticmethod
    def backward(ctx: Any, slope_N: Tensor, _: Any) -> Any:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * slope_N[:, None].to(grad_ND.dtype), None, None, None, None)

"""CAUSAL_LM: plain text, or a prompt with the completion that is learned; loss in nats a supervised token first.

Shapes: B rows, T tokens, N supervised positions, D hidden, V words.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.data import Record
from lorasweep.spec import DataSpec
from lorasweep.tasks.task import IGNORE, Batch, Example, Prediction, Task, mean_loss

CHUNK_LOGITS = 2**24
"""Logits that exist at once: 64 MiB in fp32, 340 positions of a 49k vocabulary."""

CHANGED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of models that change the logits after the head; their own forward is used."""


class CausalLM(Task):
    name = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    metric_names = ("loss", "perplexity", "token_accuracy")

    def columns(self, spec: DataSpec) -> dict[str, str]:
        if spec.prompt_column and spec.completion_column:
            return {"prompt": spec.prompt_column, "completion": spec.completion_column}
        return {"text": spec.text_column}

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Supervise the completion and the end token that follows it; of plain text, every token but the first."""
        start = [tokenizer.bos_token_id] if getattr(tokenizer, "add_bos_token", False) else []
        if "prompt" in records[0]:
            heads = _plain(tokenizer, [str(r["prompt"]) + spec.prompt_suffix for r in records])
            tails = _plain(tokenizer, [str(r["completion"]) for r in records])
        else:
            heads = [[]] * len(records)
            tails = _plain(tokenizer, [str(r["text"]) for r in records])
        examples = []
        for row, (head, tail) in enumerate(zip(heads, tails, strict=True)):
            ids = (start + head + tail + [tokenizer.eos_token_id])[: spec.max_tokens]
            labels = ([IGNORE] * len(start + head) + tail + [tokenizer.eos_token_id])[: spec.max_tokens]
            supervised = sum(label != IGNORE for label in labels[1:])
            if supervised:
                examples.append(Example(row=row, inputs={"input_ids": ids}, target=labels, supervised=supervised))
        return examples

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        table = torch.full((len(examples), length), IGNORE)
        for i, e in enumerate(examples):
            table[i, : len(e.target)] = torch.tensor(e.target)
        return table

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        losses_N, where, _ = self._token_losses(model, batch)
        return losses_N.new_zeros(len(batch.rows)).index_add(0, where, losses_N)

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        losses_N, where, correct_N = self._token_losses(model, batch)
        sums = torch.zeros(3, len(batch.rows), device=losses_N.device)
        sums.index_add_(1, where, torch.stack([losses_N, torch.ones_like(losses_N), correct_N.float()]))
        losses, counts, correct = sums.tolist()
        return [
            {"row": r, "loss": loss, "supervised": int(count), "correct": int(right)}
            for r, loss, count, right in zip(batch.rows, losses, counts, correct, strict=True)
        ]

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        loss = mean_loss(predictions)
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700)),
            "token_accuracy": sum(p["correct"] for p in predictions) / sum(p["supervised"] for p in predictions),
        }

    def readable(self, record: Record, prediction: Prediction) -> str:
        per_token = prediction["loss"] / prediction["supervised"]
        return f"{prediction['correct']} of {prediction['supervised']} tokens right, {per_token:.3f} nats a token"

    def _token_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, row and hit of each supervised position, [N] each. Position t is scored against label t+1."""
        targets_BT = batch.labels[:, 1:]
        keep_BT = targets_BT != IGNORE
        where = keep_BT.nonzero()[:, 0]
        targets_N = targets_BT[keep_BT]
        head = model.get_output_embeddings()
        changed = any(getattr(model.config, k, None) for k in CHANGED_LOGITS)
        if changed or type(head) is not nn.Linear or any(p.requires_grad for p in head.parameters()):
            logits_NV = model(**batch.inputs, use_cache=False).logits[:, :-1][keep_BT].float()
            losses = nn.functional.cross_entropy(logits_NV, targets_N, reduction="none")
            return losses, where, logits_NV.argmax(-1) == targets_N
        decoder = getattr(model, model.base_model_prefix)
        hidden_BTD = decoder(**batch.inputs, use_cache=False).last_hidden_state
        losses, hits = HeadLoss.apply(hidden_BTD[:, :-1][keep_BT], head.weight, head.bias, targets_N)
        return losses, where, hits


class HeadLoss(torch.autograd.Function):
    """Cross-entropy of `hidden W^T + b` whose logits exist one chunk at a time.

    W and b are frozen. The gradient towards the hidden states is made in the forward pass, while a chunk's logits are
    there; only that is kept.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor) -> Any:
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        wants = ctx.needs_input_grad
        grad_ND = torch.empty_like(hidden_ND) if wants[0] else None
        losses_N = torch.empty(
            len(targets_N), dtype=torch.promote_types(hidden_ND.dtype, torch.float32), device=hidden_ND.device
        )
        hits_N = torch.empty(len(targets_N), dtype=torch.bool, device=hidden_ND.device)
        for i in range(0, len(targets_N), rows):
            part = slice(i, i + rows)
            logits_CV = nn.functional.linear(hidden_ND[part], weight_VD, bias_V).to(losses_N.dtype)
            target_C1 = targets_N[part, None]
            hits_N[part] = logits_CV.argmax(-1) == targets_N[part]
            log_z_C1 = logits_CV.logsumexp(-1, keepdim=True)
            losses_N[part] = (log_z_C1 - logits_CV.gather(1, target_C1))[:, 0]
            if grad_ND is not None:
                slope_CV = logits_CV.sub_(log_z_C1).exp_()
                slope_CV.scatter_add_(1, target_C1, slope_CV.new_full(target_C1.shape, -1.0))
                grad_ND[part] = slope_CV.to(weight_VD.dtype) @ weight_VD
        ctx.save_for_backward(grad_ND)
        ctx.mark_non_differentiable(hits_N)
        return losses_N, hits_N

    @staticmethod
    def backward(ctx: Any, slope_N: Tensor, _: Any) -> Any:
        (grad_ND,) = ctx.saved_tensors
        return (grad_ND * slope_N[:, None].to(grad_ND.dtype), None, None, None)


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

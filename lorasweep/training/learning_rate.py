"""train.learning_rate=auto: a peak learning rate from what is known before training.

The rule is a judgement over published recipes, each of which it meets within a factor of three; docs/lora.md has the
table and what is not checked. It is written for r=16, lora_alpha=32 and 16 examples a step.
"""

import math
from typing import Any

from lorasweep.config.spec import LoraSpec, TrialSpec
from lorasweep.tasks.task import Task

HIDDEN_SIZE = 2000
BATCH_SIZE = 16
MOST_BATCHES = 8
"""Beyond so many times BATCH_SIZE a larger batch takes no larger rate."""
ALPHA, RANK = 32, 16


def peak(spec: TrialSpec, task: Task, model: Any) -> float:
    """Return the highest learning rate of a trial's course, as it is given or by the rule."""
    train = spec.train
    if not isinstance(train.learning_rate, str):
        return train.learning_rate
    rate = task.base_rate * math.sqrt(HIDDEN_SIZE / hidden_size(model))
    if task.divisible:  # else the batch changes the task: more wrong answers to tell from
        rate *= math.sqrt(min(MOST_BATCHES, train.batch_size / BATCH_SIZE))
    return rate * spec.lora.init.rate / relative_scale(spec.lora) * train.lr_multiple


def hidden_size(model: Any) -> int:
    """Return the width of the model's hidden states."""
    size = getattr(model.config.get_text_config(), "hidden_size", None)
    return size if isinstance(size, int) else model.get_input_embeddings().embedding_dim


def relative_scale(lora: LoraSpec) -> float:
    """Return by how much a step moves the weights more than with lora_alpha=32.

    A fixed alpha with scale alpha / r makes early steps of one size at any rank; where alpha grows with r, its value at
    r=16 counts. With rsLoRA, alpha / sqrt(r), steps grow with sqrt(r).
    """
    alpha = lora.alpha_ratio * RANK if lora.alpha_ratio is not None else lora.alpha
    return alpha / ALPHA * (math.sqrt(lora.r) if lora.use_rslora else 1.0)


def said(spec: TrialSpec, task: Task, model: Any) -> str:
    """Return what auto came to, in words; "" for a rate that was given."""
    if not isinstance(spec.train.learning_rate, str):
        return ""
    times = f" ({spec.train.lr_multiple:g} times the rule's)" if spec.train.lr_multiple != 1 else ""
    return f"train.learning_rate=auto came to {peak(spec, task, model):.2g}{times}"

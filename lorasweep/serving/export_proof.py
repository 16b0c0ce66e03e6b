"""An exported folder is loaded as a stranger would load it, and has to answer as the trial does."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model, quantization
from lorasweep.models.layer_stack import NEAR, answers
from lorasweep.serving.winner import Loaded
from lorasweep.tasks.task import Example, Task
from lorasweep.training import workload

ROWS = 8
"""Rows of the eval split, spread over it, whose answers are compared."""

ROUNDING = 1e-3
"""Largest relative difference of a row's answers in single precision; merging rounds each weight once more."""


ROUNDED_ULPS = 4
"""Units in the last place of a number's mean that adding it up may cost."""


@dataclass(frozen=True)
class Proof:
    """How near an exported model's answers are to the trial's."""

    rows: int
    difference: float
    """Largest relative difference of a row's logits or vectors."""
    to_add: float = 0.0
    """What the trial answers more than the exported model, whose head has no bias."""


def rows_of(loaded: Loaded) -> list[Example]:
    """Return some eval rows of the trial. Raises ConfigError where its data are gone."""
    try:
        examples = workload.workload(loaded.spec).examples["eval"]
    except ConfigError as error:
        gone = (
            "export: the eval rows, on which what is written has to answer as the trial does, are not to be read here"
        )
        raise ConfigError([gone, *error.problems]) from error
    step = max(1, len(examples) // ROWS)
    return [examples[i] for i in range(0, len(examples), step)][:ROWS]


@torch.inference_mode()
def answered(model: Any, task: Task, tokenizer: Any, rows: Sequence[Example]) -> list[list[Tensor]]:
    """Return what a model gives for each row by itself, on the CPU; where that is one answer a text, it alone."""
    device = next(model.parameters()).device
    most = 1 if task.one_answer else 2
    out = []
    for example in rows:
        batch = task.collate([[example]], tokenizer.pad_token_id, device)
        texts = (batch.inputs, *batch.others)
        out.append([t.float().cpu() for inputs in texts for t in answers(model(**inputs))[:most]])
    return out


def prove(
    folder: Path, loaded: Loaded, expected: Sequence[Sequence[Tensor]], rows: Sequence[Example], merged: bool
) -> Proof:
    """Return how near the folder's model is to what the trial `expected` it to answer. Raises ConfigError with the
    figure where that is more than rounding.
    """
    model = _merged(folder, loaded) if merged else _adapted(folder, loaded)
    found = answered(model, loaded.task, loaded.tokenizer, rows)
    pairs = chain.from_iterable(zip(one, other, strict=True) for one, other in zip(expected, found, strict=True))
    worst = float(torch.tensor([0.0, *(_apart(a, b, loaded.task) for a, b in pairs)]).max())  # nan where one is
    limit = NEAR.get(next(p.dtype for p in model.parameters() if p.is_floating_point()), ROUNDING)
    if not worst <= limit:  # nor nan
        how = "transformers" if merged else "transformers and peft"
        raise ConfigError(
            [
                f"export: the written model, loaded by plain {how}, answers otherwise than the trial: up to "
                f"{worst:.2g} of a row's logits (rounding is up to {limit:g}); nothing was exported"
                + ("; export without --merged" if merged else "")
            ]
        )
    return Proof(len(rows), worst, loaded.task.unexported)


def _apart(expected: Tensor, found: Tensor, task: Task) -> float:
    """Return the difference of two answers as a share of the first; for numbers, of how far they are from their mean,
    which may lie far from zero. What single precision rounds of a mean is no difference.
    """
    zero, one = task.in_units(torch.zeros(1)), task.in_units(torch.ones(1))
    least = 1e-12 if one == 1 else float((one - zero).abs())
    rounded = ROUNDED_ULPS * torch.finfo(torch.float32).eps * zero.abs()
    apart = ((expected - found).norm() - rounded).clamp_min(0)
    return float(apart / (expected - zero).norm().clamp_min(least))


def _merged(folder: Path, loaded: Loaded) -> Any:
    """Return the folder's model, by transformers alone; pooled as the card says where it does not pool by itself."""
    spec = loaded.spec.model
    auto = transformers.EncoderDecoderModel if spec.decoder else getattr(transformers, loaded.task.auto_class)
    model = auto.from_pretrained(folder, dtype=_dtype(loaded), trust_remote_code=spec.trust_remote_code).eval()
    return _as_the_card_says(model, loaded)


def _adapted(folder: Path, loaded: Loaded) -> Any:
    """Return the folder's adapter on its base, as peft's model of it. A base that lorasweep makes, joined of two or
    rounded by LoftQ, comes from it.
    """
    spec = loaded.spec
    if spec.model.decoder or spec.lora.init_lora_weights == "loftq":
        base = base_model.load(spec.model, spec.train, loaded.task, loaded.tokenizer)
        return adapter.reload(folder, base, spec.lora, spec.task_type)
    auto = getattr(transformers, loaded.task.auto_class)
    how: dict[str, Any] = quantization.loading(spec.model, _dtype(loaded), set())
    if spec.model.quantization != "none":
        how["device_map"] = {"": next(loaded.inner.parameters()).device}
    base = auto.from_pretrained(
        base_model.source(spec.model),
        revision=spec.model.revision,
        trust_remote_code=spec.model.trust_remote_code,
        dtype=_dtype(loaded),
        **how,
        **loaded.task.model_kwargs(),
        ignore_mismatched_sizes=base_model.replaces_head(spec.model, loaded.task),
    )
    return adapter.on(_as_the_card_says(base, loaded), folder)


def _dtype(loaded: Loaded) -> torch.dtype:
    return loaded.inner.dtype


def _as_the_card_says(model: Any, loaded: Loaded) -> Any:
    with contextlib.suppress(AttributeError):  # a config of a family without padding
        model.config.pad_token_id = loaded.tokenizer.pad_token_id
    if loaded.spec.model.pooling == "mean" and not loaded.task.pools:
        base_model.pool_by_mean(model)
    loaded.task.trim(model)  # what nobody reads, such as the pooler beside vectors of tokens
    quantization.install(model)
    if loaded.spec.model.quantization == "none":
        model.to(next(loaded.inner.parameters()).device)
    return model

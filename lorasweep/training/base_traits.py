"""What a base is like that decides which trials may share a pass: tried once, before any trial is on it."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lorasweep.models import row_order
from lorasweep.tasks.task import Batch, Example, Task, lengths_of
from lorasweep.training.first_token import Place, find
from lorasweep.training.workload import Prepared

log = logging.getLogger(__name__)


@dataclass
class BaseTraits:
    first_token: Place | None = None
    """From where on the model reads the first token alone."""
    alone: str = ""
    """Why no two trials may share a pass, if so."""
    scattered: Collection[nn.Module] = field(default_factory=set)
    """Modules that do not see a batch's rows one below the other."""
    holders: Mapping[nn.Module, Mapping[row_order.Place, bool]] = field(default_factory=dict)
    """Which of a module's arguments hold rows."""


def tried(model: Any, task: Task, prepared: Prepared) -> BaseTraits:
    """Return the traits that a few of the training texts show."""
    probes = _probes(prepared.train)
    device = next(model.parameters()).device

    def batch(examples: Sequence[Example]) -> Batch:
        return task.collate([examples], prepared.pad_id, device)

    if not probes:
        return BaseTraits(alone=_padding_reason(task))
    together = batch(probes)
    traits = BaseTraits(alone=_padding_reason(task))
    if len(probes) > 1 and not traits.alone:
        traits.alone = _dependence_reason(model, task, [batch([e]) for e in probes], together)
    one = batch(probes[:1]).inputs
    traits.scattered, traits.holders = row_order.scattered(model, one), row_order.holders(model, one)
    if task.one_answer and len(probes) > 1:
        traits.first_token = find(model, together.inputs)
    return traits


def _padding_reason(task: Task) -> str:
    return "texts are padded on the left, which only a trial alone is" if task.padding_side == "left" else ""


def _dependence_reason(model: Any, task: Task, alone: Sequence[Batch], together: Batch) -> str:
    """Return why a text's answer depends on its batch: trials would pad each other's texts, and that would show."""
    if not _is_row_dependent(model, task, alone, together):
        return ""
    reason = f"{type(model).__name__} answers a text otherwise beside a longer one"
    log.warning("%s: trials train alone, and what batch a text is in shows in its score", reason)
    return reason


def _is_row_dependent(model: Any, task: Task, alone: Sequence[Batch], together: Batch) -> bool:
    if model.get_output_embeddings() is None:
        pairs = zip(*((b.inputs, *b.others) for b in (*alone, together)), strict=True)
        answer = row_order.of_model(model)
        return any(row_order.depends_on_padding(answer, texts[:-1], texts[-1]) for texts in pairs)
    batches = {id(b.inputs): b for b in (*alone, together)}  # all logits would not fit: their losses tell
    return row_order.depends_on_padding(
        lambda inputs: [task.row_losses(model, batches[id(inputs)])], [b.inputs for b in alone], together.inputs
    )


def _probes(examples: Sequence[Example]) -> list[Example]:
    """Return the shortest example of at least two tokens, a middle one and the longest."""
    lengths = lengths_of(examples)
    order = sorted((i for i, n in enumerate(lengths) if n > 1), key=lengths.__getitem__)
    if not order:
        return []
    chosen = list({lengths[i]: i for i in (order[0], order[len(order) // 2], order[-1])}.values())
    found = [examples[i] for i in (chosen if len(chosen) > 1 else order[:2])]
    return found[:2] if len(found) == max(map(len, found)) else found  # not as many as tokens

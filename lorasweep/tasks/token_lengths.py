"""How long a data set's examples are in the model's tokens, and what data.max_tokens is where nobody says."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data.dataset import Record
from lorasweep.tasks.task import Task, lengths_of

SAMPLE_ROWS = 2000
"""Rows whose tokens are counted, spread evenly over the training split."""

QUANTILE = 0.99
STEP = 8
"""Lengths are rounded up to a multiple of this, which is what tensor cores want."""

LEAST, MOST = 128, 2048
"""Bounds of the length that is found; longer ones are asked for by hand."""

UNCUT = 1_000_000
"""A length that cuts nothing."""


def settle_max_tokens(
    task: Task, records: Sequence[Record], tokenizer: Any, spec: DataSpec
) -> tuple[DataSpec, list[str]]:
    """Return the settings with a number for max_tokens, and a note where it was found here: the 99th percentile of the
    examples, within what the tokenizer says that its model reads.
    """
    if spec.max_tokens is not None:
        return spec, []
    step = -(-len(records) // SAMPLE_ROWS)
    counted = copy.copy(task)  # its notes and what it learns while encoding are of no use
    counted.notes = []
    examples = counted.encode(records[::step], tokenizer, replace(spec, max_tokens=UNCUT, too_long="drop"))
    lengths = sorted(lengths_of(examples))
    if not lengths:
        return replace(spec, max_tokens=LEAST), []
    wanted = lengths[min(len(lengths) - 1, int(QUANTILE * len(lengths)))]
    if lengths[-1] <= 1.25 * wanted:
        wanted = lengths[-1]
    reads = min(MOST, getattr(tokenizer, "model_max_length", MOST) or MOST)
    found = min(max(LEAST, -(-wanted // STEP) * STEP), reads)
    cut = sum(n > found for n in lengths) / len(lengths)
    longer = f", {cut:.1%} of train is longer" if cut else ""
    return replace(spec, max_tokens=found), [
        f"data.max_tokens={found} by the data (longest {lengths[-1]} tokens{longer}; the tokenizer's limit is {reads})"
        if found == reads
        else f"data.max_tokens={found} by the data (longest {lengths[-1]} tokens{longer})"
    ]


def rules_of(tokenizer: Any) -> str:
    """Return what says how a tokenizer cuts text: equal for those that cut it into the same tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)
    rules = json.loads(backend.to_str())
    return json.dumps({k: v for k, v in rules.items() if k not in ("truncation", "padding")}, sort_keys=True)

"""How many tokens a model has positions for, and which token ids its embedding has rows for."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.tasks.task import Example

POSITIONS = re.compile(r"wpe|\w*pos(ition)?s?_?(embed\w*|enc\w*)?|embed_positions")
"""Last part of the name of a table of learned positions: BERT's position_embeddings, GPT-2's wpe, BART's
embed_positions, GPT's positions_embed. Relative tables (DeBERTa's rel_embeddings, T5's bias) set no limit."""

PAD_CANDIDATES = ("eos_token_id", "sep_token_id", "bos_token_id", "cls_token_id", "unk_token_id")


def positions(model: Any) -> dict[str, int]:
    """Return the longest input of the `encoder` (of a model with one stack: of it) and of the `decoder`, where a table
    of learned positions ends it; a stack without one is left out.
    """
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.fullmatch(name.rpartition(".")[2]):
            stack = "decoder" if two_stacks and "decoder" in name.split(".") else "encoder"
            owner = model.get_submodule(name.rpartition(".")[0])
            found[stack] = min(found.get(stack, module.num_embeddings), _rows(module, owner))
    return found


def _rows(table: nn.Embedding, owner: nn.Module) -> int:
    """Return how many tokens a table of positions serves.

    RoBERTa counts from padding_idx + 1 (514 rows hold 512), BART and OPT from `offset`, Nystromformer as its buffer of
    position ids says.
    """
    offset = int(getattr(table, "offset", 0) or 0)
    if not offset and table.padding_idx is not None:
        offset = table.padding_idx + 1
    ids = getattr(owner, "position_ids", None)
    counted = ids.shape[-1] if ids is not None and not isinstance(ids, nn.Module) else table.num_embeddings
    return min(table.num_embeddings - offset, counted)


def fitted(data: DataSpec, model: Any) -> tuple[DataSpec, list[str]]:
    """Return the data's settings, max_tokens known, cut to the model's positions, and a note for each that was cut."""
    assert data.max_tokens is not None
    limits, notes = positions(model), []
    kind = type(model).__name__
    encoder, decoder = limits.get("encoder", data.max_tokens), limits.get("decoder", data.max_target_tokens)
    if encoder < data.max_tokens:
        notes.append(f"data.max_tokens={data.max_tokens}: {kind} has {encoder} positions; texts are cut to {encoder}")
    if decoder < data.max_target_tokens and getattr(model.config, "is_encoder_decoder", False):
        notes.append(
            f"data.max_target_tokens={data.max_target_tokens}: the decoder of {kind} has {decoder} positions; targets "
            f"are cut to {decoder}"
        )
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not limits and isinstance(trained, int) and 0 < trained < data.max_tokens:
        notes.append(f"data.max_tokens={data.max_tokens}: {kind} was made for texts of up to {trained} tokens")
    return (
        replace(
            data,
            max_tokens=min(data.max_tokens, encoder),
            max_target_tokens=min(data.max_target_tokens, decoder),
        ),
        notes,
    )


def generation_problems(task: TaskSpec, model: Any, examples: Sequence[Example]) -> list[str]:
    """Return a problem where prompts and what is written after them are longer than the model's positions."""
    limits = positions(model)
    if not task.generate:
        return []
    if getattr(model.config, "is_encoder_decoder", False):
        room, before = limits.get("decoder"), 1
    else:
        room, before = limits.get("encoder"), max((len(e.info[0]) for e in examples if e.info), default=0)
    if room is None or before + task.max_new_tokens <= room:
        return []
    return [
        f"task_type.max_new_tokens: {task.max_new_tokens} after {before} tokens are more than the {room} positions of "
        f"{type(model).__name__}; use at most {max(0, room - before)}, or a smaller data.max_tokens"
    ]


def vocabulary(model: Any) -> float:
    """Return how many tokens the embedding has rows for; any number in a model that hashes its ids (CANINE)."""
    try:
        return float(model.get_input_embeddings().num_embeddings)
    except NotImplementedError:
        return math.inf


def settle_pad(model: Any, tokenizer: Any) -> list[str]:
    """Give the tokenizer a padding token that the model has a row for, and the model the same; return notes.

    Padded positions are masked, so that any token will do.
    """
    rows = vocabulary(model)
    notes = []
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
        old, had = tokenizer.pad_token, tokenizer.pad_token_id
        ids = [i for name in PAD_CANDIDATES if (i := getattr(tokenizer, name)) is not None and i < rows]
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ids[0] if ids else 0)
        why = "the tokenizer has no padding token"
        if had is not None:
            why = f"the padding token '{old}' (id {had}) has no row in the embedding of {rows:.0f}"
        notes.append(f"{why}: '{tokenizer.pad_token}' pads in its place")
    for config in (model.config, model.config.get_text_config()):  # a decoder's classifier looks for it in its own
        config.pad_token_id = tokenizer.pad_token_id
    return notes


def id_problems(model: Any, tokenizer: Any, splits: dict[str, Sequence[Example]]) -> list[str]:
    """Return a problem where an example holds a token that the embedding has no row for."""
    rows = vocabulary(model)
    for examples in splits.values():
        highest = _highest_id(examples)
        if highest >= rows:
            token = tokenizer.convert_ids_to_tokens(highest)
            return [
                f"model.tokenizer: the token '{token}' (id {highest}), which the examples hold, has no row in the "
                f"embedding of {rows:.0f}; name the tokenizer that the model was trained with"
            ]
    return []


def _highest_id(examples: Sequence[Example]) -> int:
    """Return the highest token id of a split; that of examples on disk is read in one go."""
    known: int | None = getattr(examples, "highest_id", None)
    return (
        known if known is not None else max((int(np.max(e.inputs["input_ids"])) for e in examples if len(e)), default=0)
    )

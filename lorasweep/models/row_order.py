"""Whether a model computes each row of a batch by itself, and where: found by trying, no model is known by its name.

XLNet's layers see the tokens first, [T, B, D]; FNet mixes padding into every row; experts get tokens in another order.
Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.models.layer_stack import NEAR, Inputs, answers

CHANGED = 1
"""Row of a batch whose text is another one when the modules are watched."""

BATCHES = (3, 5)
"""Rows of two batches of one text: what grows as they do holds them."""

Place = tuple[int | str, ...]
"""Where a tensor stands among a module's arguments: by position and name, from the outside in."""

ROUNDING = 1e-4
"""Largest relative difference of two answers in single precision that are the same but for rounding."""

TEXTS = ("one", "a text of some more words", "and two")
"""What the side of padding is tried on: unlike, and of unlike lengths."""


@torch.no_grad()
def scattered(model: Any, inputs: Inputs) -> set[nn.Module]:
    """Return the modules whose input holds neither a batch's rows, one below the other, nor one row for all.

    `inputs` are one row. It is read several times in one batch, once with another text in the second place: what
    changes of a module's input has to lie there.
    """
    length = inputs["input_ids"].shape[1]
    rows = 4 if length == 3 else 3  # not as many as tokens
    same = {name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    other = {name: value.clone() for name, value in same.items()}
    for name in other:
        if name.endswith("input_ids"):
            other[name][CHANGED] = other[name][CHANGED].flip(0)
    first, second = _traces(model, same), _traces(model, other)
    return {m for m in first | second if not _in_order(first.get(m, []), second.get(m, []), rows, length)}


@torch.no_grad()
def holders(model: Any, inputs: Inputs) -> dict[nn.Module, dict[Place, bool]]:
    """Return, for each module, whether a tensor that it is given holds a batch's rows one below the other: then it
    grows as they do. `inputs` are one row.
    """
    few, many = (_sizes(model, inputs, rows) for rows in BATCHES)
    out: dict[nn.Module, dict[Place, bool]] = {}
    for module, places in few.items():
        for place, found in places.items():
            others = many.get(module, {}).get(place, set())
            if len(found) == len(others) == 1:  # else it depends on the call
                grows = min(found) * BATCHES[1] == min(others) * BATCHES[0]
                out.setdefault(module, {})[place] = grows
    return out


def _sizes(model: Any, inputs: Inputs, rows: int) -> dict[nn.Module, dict[Place, set[int]]]:
    """Return the first sizes of the tensors that each module is given, of as many rows of one text."""
    out: dict[nn.Module, dict[Place, set[int]]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        for place, x in placed((args, kwargs)):
            out.setdefault(module, {}).setdefault(place, set()).add(len(x))

    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(**{name: value.repeat(rows, *[1] * (value.dim() - 1)) for name, value in inputs.items()})
    return out


def placed(given: Any, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Yield the tensors with a dimension among a module's arguments, each with where it stands."""
    if isinstance(given, Tensor):
        if given.dim():
            yield place, given
    elif isinstance(given, tuple):
        for i, value in enumerate(given):
            yield from placed(value, (*place, i))
    elif isinstance(given, dict):
        for name, value in given.items():
            yield from placed(value, (*place, name))


def _traces(model: Any, inputs: Inputs) -> dict[nn.Module, list[Tensor]]:
    """Return two numbers for each entry of the first tensor that a module is given, at each of its calls."""
    out: dict[nn.Module, list[Tensor]] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()), None)
        if x is not None:
            entries = x.detach().flatten(1).float() if x.dim() > 1 else x.detach()[:, None].float()
            out.setdefault(module, []).append(torch.stack([entries.sum(1), entries.square().sum(1)], 1))

    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        model(**inputs)
    return out


def _in_order(first: list[Tensor], second: list[Tensor], rows: int, length: int) -> bool:
    if [x.shape for x in first] != [x.shape for x in second]:
        return False
    for x, y in zip(first, second, strict=True):
        changed = (x != y).any(1).nonzero()[:, 0]
        each = len(x) // rows
        if not len(changed):
            if len(x) not in (1, rows, rows * length):
                return False
        elif len(x) % rows or int(changed.min()) < CHANGED * each or int(changed.max()) >= (CHANGED + 1) * each:
            return False
    return True


@torch.no_grad()
def depends_on_padding(
    answer: Callable[[Inputs], Sequence[Tensor]], alone: Sequence[Inputs], together: Inputs, side: str = "right"
) -> bool:
    """Tell whether rows are answered otherwise beside longer ones than `alone`, padded on this side."""
    expected = [answer(one) for one in alone]
    found = answer(together)
    for i, own in enumerate(expected):
        for x, whole in zip(own, found, strict=True):
            if len(whole) == len(alone) and _apart(x[0], _cut(whole[i], x[0], side)):
                return True
    return False


def _apart(a: Tensor, b: Tensor) -> bool:
    return not bool((a - b).norm() <= NEAR.get(a.dtype, ROUNDING) * a.norm())


def of_model(model: Any) -> Callable[[Inputs], list[Tensor]]:
    """Return a function that gives a model's answers."""
    return lambda inputs: answers(model(**inputs))


def _cut(row: Tensor, like: Tensor, side: str) -> Tensor:
    """Return the part of a padded row that is as large as `like`."""
    for dim, size in enumerate(like.shape):
        row = row.narrow(dim, 0 if side == "right" else row.shape[dim] - size, size)
    return row


def padding_side(model: Any, tokenizer: Any) -> str:
    """Return the side on which texts are padded so that each is answered as by itself: right, else left, else the
    tokenizer's. XLNet's classifier reads the last token.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor([tokenizer(text)["input_ids"]], device=device) for text in TEXTS]
    rows = [ids for ids in rows if ids.shape[1]]
    alone = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows]
    length = max(ids.shape[1] for ids in rows)
    for side in ("right", "left"):
        padded = [
            [_padded(one[key], length, fill, side) for one in alone]
            for key, fill in (("input_ids", tokenizer.pad_token_id), ("attention_mask", 0))
        ]
        together = {"input_ids": torch.cat(padded[0]), "attention_mask": torch.cat(padded[1])}
        if not depends_on_padding(of_model(model), alone, together, side):
            return side
    return tokenizer.padding_side


def _padded(row_1T: Tensor, length: int, fill: int, side: str) -> Tensor:
    more = length - row_1T.shape[1]
    return nn.functional.pad(row_1T, (0, more) if side == "right" else (more, 0), value=fill)

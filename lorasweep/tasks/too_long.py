"""Texts that are longer than data.max_tokens: cut and counted, or refused. Prompts that leave no room for their answer:
left out and counted, cut at their left, or refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lorasweep.config.spec import DataSpec
from lorasweep.data.table import Record, place_of
from lorasweep.errors import ConfigError
from lorasweep.tasks import special_tokens
from lorasweep.tasks.token_lengths import UNCUT

MOST_DROPPED = 0.05
"""Share of rows that may be left out where nobody asked for it."""

IGNORE = -100
Turns = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids that are only read, and those that are learned after them, in alternation."""


def tokenised(
    tokenizer: Any, texts: Mapping[str, Sequence[str]], limit: int | None, **how: Any
) -> tuple[dict[str, list[Any]], list[int]]:
    """Return the columns of the tokenizer's output, at most `limit` tokens a row, and the rows that were cut to it.

    `texts` are the tokenizer's text, text_pair or text_target.
    """
    bare = {part: special_tokens.bare(tokenizer, column) for part, column in texts.items()}
    how = {"return_attention_mask": False, "verbose": False, **how}
    tokens = {name: list(column) for name, column in tokenizer(**bare, **how).items()}
    cut = [i for i, ids in enumerate(tokens["input_ids"]) if len(ids) > (limit or UNCUT)]
    if cut:
        some = {part: [column[i] for i in cut] for part, column in bare.items()}
        shorter = tokenizer(**some, truncation=True, max_length=limit, **how)
        for name, column in shorter.items():
            for i, value in zip(cut, column, strict=True):
                tokens[name][i] = value
    return tokens, cut


def cut_notes(spec: DataSpec, records: Sequence[Record], cut: Sequence[int], what: str = "rows") -> list[str]:
    """Return a note on the rows that were cut. Raises ConfigError where data.too_long allows none."""
    if not cut:
        return []
    key = "data.max_target_tokens" if what == "targets" else "data.max_tokens"
    limit = spec.max_target_tokens if what == "targets" else spec.max_tokens
    told = f"{len(cut)} of {len(records)} {what} are longer than {key}={limit}"
    if spec.too_long == "error":
        places = ", ".join(place_of(records[i], i + 1) for i in cut[:3])
        raise ConfigError([f"data.too_long: {told} ({places}); give a larger {key}, or data.too_long=truncate"])
    return [f"{told} and are cut to it"]


class Cutter:
    """Cuts examples to data.max_tokens, as data.too_long says, and counts what that costs."""

    def __init__(self, spec: DataSpec, start: Sequence[int]) -> None:
        self.limit = spec.max_tokens or UNCUT
        self.too_long = spec.too_long
        self._start = list(start)
        """Tokens that begin every text, kept where the left is cut."""
        self._dropped: list[int] = []
        self._prompts_cut = 0
        self._answers_cut = 0

    def fit(self, row: int, turns: Turns) -> tuple[list[int], list[int]] | None:
        """Return tokens and labels of an example, None for one that is left out."""
        ids: list[int] = []
        labels: list[int] = []
        for head, tail in turns:
            ids += [*head, *tail]
            labels += [*[IGNORE] * len(head), *tail]
        if len(ids) <= self.limit:
            return ids, labels
        answer = len(turns[-1][1])
        if self.too_long == "truncate" and len(ids) - answer > len(self._start):
            self._prompts_cut += 1
            return self._without_left(ids, labels, answer)
        if all(label == IGNORE for label in labels[1 : self.limit]):
            self._dropped.append(row)
            return None
        self._answers_cut += len(ids) > answer
        return ids[: self.limit], labels[: self.limit]

    def _without_left(self, ids: list[int], labels: list[int], answer: int) -> tuple[list[int], list[int]]:
        """Return what ends with the answer; of a longer answer, its beginning behind the prompt's last token."""
        begun = len(self._begun(ids))
        room = self.limit - begun
        first = min(len(ids) - room, len(ids) - answer - 1)
        kept = slice(max(first, begun), max(first, begun) + room)
        return ids[:begun] + ids[kept], labels[:begun] + labels[kept]

    def _begun(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens that a text begins with like every other, where they leave room for more."""
        fits = len(self._start) < self.limit - 1 and list(ids[: len(self._start)]) == self._start
        return self._start if fits else []

    def prompt(self, ids: Sequence[int]) -> list[int]:
        """Return a prompt that is answered by generation, its left cut so that a token follows."""
        if len(ids) < self.limit:
            return list(ids)
        begun = self._begun(ids)
        return begun + list(ids[len(ids) - (self.limit - 1 - len(begun)) :])

    def notes(self, records: Sequence[Record]) -> list[str]:
        """Return what was cut and left out. Raises ConfigError where that is more than allowed."""
        told = f"{len(self._dropped)} of {len(records)} rows have a prompt that fills data.max_tokens={self.limit}"
        allowed = {"error": 0.0, "auto": MOST_DROPPED}.get(self.too_long, 1.0)
        if len(self._dropped) > allowed * len(records):
            places = ", ".join(place_of(records[i], i + 1) for i in self._dropped[:3])
            raise ConfigError(
                [
                    f"data.too_long: {told}, so that nothing of the answer is left ({places}); give a larger "
                    "data.max_tokens, data.too_long=truncate (cuts the prompt's left) or data.too_long=drop"
                ]
            )
        notes = [f"{told} and are left out"] if self._dropped else []
        if self._prompts_cut:
            notes.append(f"{self._prompts_cut} of {len(records)} prompts are cut at their left to data.max_tokens")
        if self._answers_cut:
            notes.append(f"{self._answers_cut} of {len(records)} answers are cut at data.max_tokens={self.limit}")
        return notes

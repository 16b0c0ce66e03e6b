"""What a tokenizer puts around a text by itself: asked of the tokenizer, whose attributes do not say.

transformers reports add_bos_token False where only the post-processor adds BOS, as Llama 3's does.
"""

from collections.abc import Sequence
from typing import Any

PROBE = "a"


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the token ids that the tokenizer puts before a text and after it."""
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(PROBE)["input_ids"])
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def written_out(tokenizer: Any) -> tuple[str, str]:
    """Return what the tokenizer puts before a text and after it as a text would have it; "" where a text that has it
    is read otherwise.
    """
    before, after = around(tokenizer)
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    start, end = ("".join(tokenizer.convert_ids_to_tokens(ids)) for ids in (before, after))
    read = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (start + PROBE, PROBE + end)]
    return start if read[0] == [*before, *bare] else "", end if read[1] == [*bare, *after] else ""


def bare(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Return the texts without what the tokenizer will put around each by itself: some bring it along, written out."""
    start, end = written_out(tokenizer)
    out = []
    for text in texts:
        while start and text.lstrip().startswith(start):
            text = text.lstrip().removeprefix(start).lstrip()
        while end and text.rstrip().endswith(end):
            text = text.rstrip().removesuffix(end).rstrip()
        out.append(text)
    return out


def bare_words(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return each row's words, empty where one is what the tokenizer will put before or after all of them."""
    start, end = written_out(tokenizer)
    out = []
    for row in rows:
        words = list(row)
        for place, mark in ((0, start), (-1, end)):
            if words and mark and words[place].strip() == mark:
                words[place] = ""
        out.append(words)
    return out


def ends(tokenizer: Any) -> list[int]:
    """Return what ends a text that is learned: what the tokenizer puts there, else its end token."""
    after = around(tokenizer)[1]
    if after or tokenizer.eos_token_id is None:
        return after
    return [tokenizer.eos_token_id]


def begun(ids: Sequence[int], start: Sequence[int]) -> list[int]:
    """Return the ids behind `start`, once: a text may bring it along, written out."""
    return list(ids) if list(ids[: len(start)]) == list(start) else [*start, *ids]


def ended(ids: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return the ids before `end`, once."""
    return list(ids) if end and list(ids[-len(end) :]) == list(end) else [*ids, *end]


def asked_for(tokenizer: Any) -> tuple[bool, str | None]:
    """Return how a caller that knows only add_special_tokens gets a prompt begun and not ended: whether to ask for
    them, and what to write before the prompt; None for that where there is no way.
    """
    before, after = around(tokenizer)
    if not before or not after:
        return bool(before), ""
    text = "".join(tokenizer.convert_ids_to_tokens(before))
    bare = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    read = list(tokenizer(f"{text}{PROBE}", add_special_tokens=False)["input_ids"])
    return False, text if read == [*before, *bare] else None

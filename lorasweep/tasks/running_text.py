"""Words that a tokenizer reads one by one, as it would read them in running text."""

import re
from collections.abc import Sequence
from typing import Any

PROBE = ("the", "cat")

MARKS = "\u3001-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
"""Chinese and Japanese punctuation, which stands close to all that is beside it."""

SPACELESS = re.compile(
    f"[{MARKS}\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese, Japanese
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u0f00-\u0fff]"  # Thai, Lao, Burmese, Khmer, Tibetan
)
"""Characters of scripts without spaces between words."""


def spaced(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return each row's words with the spaces of running text, for a tokenizer that tells words by those.

    GPT-2's kind does, whatever else its pre-tokenizer is made of (Llama 3, Qwen): each word gets the space before it,
    but for the first one and between characters of scripts without spaces (Chinese, Japanese, Thai). Others put a mark
    of their own before each word.
    """
    if not _tells_by_spaces(tokenizer):
        return [list(words) for words in rows]
    return [_with_spaces(words) for words in rows]


def _with_spaces(words: Sequence[str]) -> list[str]:
    pairs = zip(["", *words], words, strict=False)
    joined = [not before or _are_close(before[-1:], word[:1]) for before, word in pairs]
    return [word if close else f" {word}" for word, close in zip(words, joined, strict=True)]


def _tells_by_spaces(tokenizer: Any) -> bool:
    """Tell whether words by themselves become other tokens than in running text, and the space before each mends it."""

    def ids(words: Sequence[str]) -> list[int]:
        return tokenizer(list(words), is_split_into_words=True, add_special_tokens=False)["input_ids"]

    together = tokenizer(" ".join(PROBE), add_special_tokens=False)["input_ids"]
    return ids(PROBE) != together and ids([PROBE[0], *(f" {word}" for word in PROBE[1:])]) == together


def is_space(text: str, place: tuple[int, int]) -> bool:
    """Tell whether a token is the space before a word and nothing of the word."""
    start, end = place
    return text.startswith(" ") and not text[start:end].strip()


def _are_close(last: str, first: str) -> bool:
    """Tell whether running text has no space between two characters."""
    if re.fullmatch(f"[{MARKS}]", last) or re.fullmatch(f"[{MARKS}]", first):
        return True
    return bool(SPACELESS.fullmatch(last) and SPACELESS.fullmatch(first))

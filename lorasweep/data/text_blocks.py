"""Running text to blocks of whole paragraphs, none longer than a given number of the model's tokens."""

import re
from collections.abc import Callable, Sequence

Count = Callable[[Sequence[str]], list[int]]
"""How many tokens each text has."""

CHARACTERS_A_TOKEN = 3
"""Characters counted as one token where there is no tokenizer to ask."""


MOST_TOKENS, LEAST_TOKENS = 256, 32
"""Length of a block where nobody says: less in a short text, so that each split gets several."""

FEW_BLOCKS = 40
MOST_CHARACTERS_A_TOKEN = 8


def fair_length(text: str, count: Count) -> int:
    """Return the tokens of a block where nobody says."""
    if len(text) > FEW_BLOCKS * MOST_TOKENS * MOST_CHARACTERS_A_TOKEN:
        return MOST_TOKENS
    return min(MOST_TOKENS, max(LEAST_TOKENS, count([text])[0] // FEW_BLOCKS))


def estimated(texts: Sequence[str]) -> list[int]:
    return [-(-len(t) // CHARACTERS_A_TOKEN) for t in texts]


def blocks(text: str, limit: int, count: Count = estimated) -> list[str]:
    """Return blocks of paragraphs (divided by empty lines) of at most `limit` tokens; long paragraphs are cut at lines,
    sentences, spaces, and in the end anywhere.
    """
    paragraphs = [p + "\n\n" for p in re.split(r"\n[^\S\n]*\n\s*", text.strip()) if p.strip()]
    pieces = _short_enough(paragraphs, limit, count)
    out: list[str] = []
    room = 0
    for piece, tokens in pieces:
        if tokens > room:
            out.append("")
            room = limit
        out[-1] += piece
        room -= tokens
    return [block.strip() for block in out if block.strip()]


CUTS = (r"(?<=\n)", r"(?<=[.!?。！？；;])", r"(?<=\s)", r"(?<=[，、,])")  # noqa: RUF001


def _short_enough(texts: Sequence[str], limit: int, count: Count, level: int = 0) -> list[tuple[str, int]]:
    """Return the texts with their tokens, those over the limit in pieces."""
    found: list[tuple[str, int]] = []
    for text, tokens in zip(texts, count(texts), strict=True):
        if tokens <= limit:
            found.append((text, tokens))
        elif level < len(CUTS):
            parts = [p for p in re.split(CUTS[level], text) if p]
            found += _short_enough(parts, limit, count, level + 1)
        elif len(text) > 1:
            half = len(text) // 2
            found += _short_enough([text[:half], text[half:]], limit, count, level)
        else:
            found.append((text, tokens))
    return found

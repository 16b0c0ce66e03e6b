"""Tagging schemes: how the tags of a sentence's words mark entities.

A mark stands before the entity's type, as in B-PER, or behind it, as in PER-B; a mark alone, as in B M E S of word
segmentation, has no type. Small letters mean the same, and so does a line below in place of the dash.

    IOB1   I-x, and B-x only for an entity that follows another of its type at once
    IOB2   B-x begins each entity, I-x goes on
    IOE1   I-x, and E-x only at the end of an entity that another of its type follows at once
    IOE2   E-x ends each entity, I-x goes before
    IOBES  B-x, I-x, E-x, and S-x for one word; M is another letter for I, W for S
    BILOU  B-x, I-x, L-x, and U-x for one word

Entities are read strictly, as seqeval's strict mode reads them: what does not follow the scheme is no entity.
Source: L. Ramshaw, M. Marcus, Text chunking using transformation-based learning, 1995; E. Tjong Kim Sang, J. Veenstra,
Representing text chunks, 1999.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

OUTSIDE = "O"

Mark = tuple[str, str]
"""Letter and type of a tag."""
Entity = tuple[str, int, int]
"""Type, first word, and the word after the last."""

SAME_LETTERS = {"IOBES": {"M": "I", "W": "S"}, "BILOU": {"L": "E", "U": "S"}}
"""What other schemes write for IOBES' letters."""

LETTERS = {"IOB": set("BI"), "IOE": set("IE"), "IOBES": set("BIMESW"), "BILOU": set("BILU")}
"""Letters of each family, the plainest first."""


BEFORE = re.compile(r"([BIEMSWLUO])(?:[-_](.*))?", re.IGNORECASE | re.DOTALL)
BEHIND = re.compile(r"(.*)[-_]([BIEMSWLU])", re.IGNORECASE | re.DOTALL)


def mark_of(tag: str) -> Mark:
    found = BEFORE.fullmatch(tag)
    if found:
        return found[1].upper(), found[2] or ""
    found = BEHIND.fullmatch(tag)
    if found:
        return found[2].upper(), found[1]
    letter, _, kind = tag.partition("-")
    return letter, kind


def recognise(sentences: Iterable[Sequence[str]], more: Iterable[str] = ()) -> str | None:
    """Return the scheme that the tags follow; None where they mark no entities, as parts of speech do. `more` are tags
    that occur beside these sentences.
    """
    rows = [list(map(mark_of, tags)) for tags in sentences]
    marks = {*chain.from_iterable(rows), *map(mark_of, more)} - {(OUTSIDE, "")}
    letters, typed = {letter for letter, _ in marks}, {bool(kind) for _, kind in marks}
    if len(typed) != 1 or (typed == {False} and "B" not in letters):
        return None
    family = next((name for name, known in LETTERS.items() if letters <= known), None)
    if family == "IOB":
        return _first_or_second(rows, "B", "IOB")
    if family == "IOE":
        return _first_or_second([row[::-1] for row in rows], "E", "IOE")
    return family


def _first_or_second(rows: Iterable[Sequence[Mark]], letter: str, family: str) -> str:
    """Return the scheme in which more entities are sound, `letter` being what begins one (rows of IOE are reversed).

    In the first, `letter` never stands where no entity of its type comes before; in the second, every entity has it.
    """
    without, needless = 0, 0
    for row in rows:
        for (_, kind_before), (mark, kind) in zip([(OUTSIDE, ""), *row], row, strict=False):
            fresh = mark != OUTSIDE and kind_before != kind
            without += fresh and mark == "I"
            needless += fresh and mark == letter
    return f"{family}1" if without > needless else f"{family}2"


def entities(tags: Sequence[str], scheme: str) -> list[Entity]:
    """Return the entities of a sentence, in order."""
    marks = [mark_of(tag) for tag in tags]
    if scheme.startswith("IOE"):  # from the end, an E begins what a B begins from the start
        turned = [("B" if letter == "E" else letter, kind) for letter, kind in reversed(marks)]
        count = len(marks)
        found = _iob(turned, scheme == "IOE1")
        return [(kind, count - end, count - start) for kind, start, end in reversed(found)]
    if scheme.startswith("IOB") and scheme != "IOBES":
        return _iob(marks, scheme == "IOB1")
    others = SAME_LETTERS[scheme]
    return _iobes([(others.get(letter, letter), kind) for letter, kind in marks])


def _iob(marks: Sequence[Mark], first: bool) -> list[Entity]:
    out: list[Entity] = []
    at = 0
    while at < len(marks):
        letter, kind = marks[at]
        before, kind_before = marks[at - 1] if at else (OUTSIDE, "")
        same = before != OUTSIDE and kind_before == kind
        begins = letter == "B" and (same or not first)
        begins = begins or (first and letter == "I" and not (before == "I" and same))
        end = at + 1
        while begins and end < len(marks) and marks[end] == ("I", kind):
            end += 1
        after, kind_after = marks[end] if end < len(marks) else (OUTSIDE, "")
        unsound = first and marks[end - 1][0] == "B" and after == "B" and kind_after != kind
        if begins and not unsound:
            out.append((kind, at, end))
        at = end
    return out


def _iobes(marks: Sequence[Mark]) -> list[Entity]:
    out: list[Entity] = []
    start: int | None = None
    for at, (letter, kind) in enumerate(marks):
        goes_on = start is not None and letter in ("I", "E") and kind == marks[start][1]
        if letter == "S":
            out.append((kind, at, at + 1))
        elif goes_on and letter == "E":
            assert start is not None
            out.append((kind, start, at + 1))
        if letter == "B":
            start = at
        elif not goes_on or letter == "E":
            start = None
    return out


def counts(predicted: Sequence[str], true: Sequence[str], scheme: str) -> tuple[int, int, int]:
    """Return how many entities are right, predicted and there."""
    ours, theirs = Counter(entities(predicted, scheme)), Counter(entities(true, scheme))
    return (ours & theirs).total(), ours.total(), theirs.total()


def unmarked(tags: Sequence[str], scheme: str) -> int:
    """Return how many words have a mark and belong to no entity: the tags do not follow the scheme there."""
    inside = sum(end - start for _, start, end in entities(tags, scheme))
    return sum(mark_of(tag)[0] != OUTSIDE for tag in tags) - inside

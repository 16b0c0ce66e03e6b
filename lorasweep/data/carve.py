"""Eval and test taken out of train: by a hash of the text, class by class, so that no class is lost to train."""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain

from lorasweep.data.table import Record

ANSWERS = ("label", "completion", "target", "positive", "negative", "score", "answers", "tags", "tools")
"""Fields that a record's place among carved splits must not depend on: they are what is learned."""

PAIRS = (("anchor", "positive"), ("source", "target"), ("prompt", "completion"))
"""Two fields of which the first says a record's place: a pair and the same pair swapped have different ones."""

KEPT_TOGETHER = ("group", "context")
"""Fields that keep records in one split; the first that is there counts."""


def carve(train: Sequence[Record], fractions: Mapping[str, float], classes: str) -> dict[str, list[Record]]:
    """Return the carved splits and what is left of train, each in train's order.

    Records of one text, group or context stay together, and so do a pair of texts and the same pair swapped. `classes`
    is the field whose classes every split should have in train's proportions, or ''; a class that has a single text
    stays in train.
    """
    units = _units(train)
    held: dict[float, set[str]] = defaultdict(set)
    for key, rows in units.items():
        for i in rows:
            held[key].update(classes_of(train[i], classes))
    split_of = _assigned(units, held, fractions)
    out: dict[str, list[Record]] = {name: [] for name in ("train", *fractions)}
    names: dict[int, str] = {}
    for key, rows in units.items():
        names |= dict.fromkeys(rows, split_of.get(key, "train"))
    for i, record in enumerate(train):
        out[names[i]].append(record)
    return out


def _units(train: Sequence[Record]) -> dict[float, list[int]]:
    """Return place -> the records that stay together there."""
    found = [place(record) for record in train]
    lower: dict[float, float] = {}
    first: dict[tuple[float, ...], float] = {}
    for record, at in zip(train, found, strict=True):
        pair = _pair(record)
        if pair:
            low, high = sorted((_lowest(lower, at), _lowest(lower, first.setdefault(pair, at))))
            if low < high:
                lower[high] = low
    units: dict[float, list[int]] = defaultdict(list)
    for i, at in enumerate(found):
        units[_lowest(lower, at)].append(i)
    return units


def _lowest(lower: dict[float, float], at: float) -> float:
    """Return the lowest place that a place was joined with; shorten the way there."""
    found = at
    while found in lower:
        found = lower[found]
    while at != found:
        lower[at], at = found, lower[at]
    return found


def _pair(record: Record) -> tuple[float, ...]:
    """Return what is equal for a pair and the same pair swapped; () where the record is none, or is kept by a group."""
    names = next((n for n in PAIRS if all(isinstance(record.get(name), str) for name in n)), ())
    if any(name in record for name in KEPT_TOGETHER):
        return ()
    return tuple(sorted(_hash([record[name]]) for name in names))


def _assigned(
    units: Mapping[float, Sequence[int]], held: Mapping[float, set[str]], fractions: Mapping[str, float]
) -> dict[float, str]:
    """Return the split of each unit that leaves train."""
    counts = Counter(chain.from_iterable(held.values()))
    strata: dict[str, list[float]] = defaultdict(list)
    for key, classes in held.items():
        strata[min(classes, key=lambda c: (counts[c], c), default="")].append(key)
    sizes = {stratum: len(keys) for stratum, keys in strata.items()}
    free = {stratum: n - 1 if stratum else n for stratum, n in sizes.items()}
    found: dict[float, str] = {}
    for name, fraction in fractions.items():
        shares = _shares(sizes, free, fraction)
        for stratum, keys in strata.items():
            waiting = [k for k in sorted(keys) if k not in found]
            found |= dict.fromkeys(waiting[: shares[stratum]], name)
            free[stratum] -= shares[stratum]
    return _without_orphans(found, held)


def _shares(sizes: Mapping[str, int], free: Mapping[str, int], fraction: float) -> dict[str, int]:
    """Return how many units of each class a split takes: its fraction of each, the rest by largest remainder."""
    exact = {c: n * fraction for c, n in sizes.items()}
    shares = {c: min(math.floor(x), free[c]) for c, x in exact.items()}
    wanted = max(1, round(sum(exact.values()))) - sum(shares.values())
    by_remainder = sorted(exact, key=lambda c: (shares[c] - exact[c], hashlib.sha256(c.encode()).digest()))
    for c in by_remainder:
        if wanted > 0 and shares[c] < free[c]:
            shares[c] += 1
            wanted -= 1
    return shares


def _without_orphans(found: dict[float, str], held: Mapping[float, set[str]]) -> dict[float, str]:
    """Return the splits of units, those back in train that hold a class which train would not have."""
    in_train = set(chain.from_iterable(classes for key, classes in held.items() if key not in found))
    for key in sorted(found):
        if not held[key] <= in_train:
            in_train |= held[key]
            del found[key]
    return found


def classes_of(record: Record, field: str) -> list[str]:
    """Return the classes that a record holds in a field; a number with a fraction is none."""
    value = record.get(field) if field else None
    values = value if isinstance(value, list) else [value]
    return [str(v) for v in values if v is not None and not isinstance(v, float)]


def place(record: Record) -> float:
    """Return a number in [0, 1) that depends on the record's normalised text alone, never on its label.

    Records of one group, or of one context where there is no group, get the same number; so do pairs of texts in either
    order.
    """
    kept = next((n for n in KEPT_TOGETHER if n in record), None)
    if kept:
        texts = [str(record[kept])]
    elif "tokens" in record:
        texts = [" ".join(record["tokens"])]
    elif "messages" in record:
        texts = [" ".join(str(m.get("content")) for m in record["messages"] if m.get("role") != "assistant")]
    else:
        texts = sorted(v for k, v in record.items() if k not in ANSWERS and isinstance(v, str))
    return _hash(texts)


def _hash(texts: Sequence[str]) -> float:
    normal = " ".join(" ".join(texts).casefold().split())
    return int.from_bytes(hashlib.sha256(normal.encode()).digest()[:7]) / 2**56


def by_what(train: Sequence[Record]) -> str:
    """Return the word for what keeps records together."""
    return next((n for n in KEPT_TOGETHER if train and n in train[0]), "text")

"""Every setting with its default, what it takes and affects, and its meaning; docs/keys.md is generated from them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import get_type_hints

from lorasweep.config import spec
from lorasweep.config.fields import Affects, affects, allowed, texts_below_fields
from lorasweep.config.spec import SECTIONS, TrialSpec

EFFECTS = {
    Affects.BASE: "another base, task or data set is loaded; trials that differ here share no pass",
    Affects.TOKENS: "examples are read and encoded again",
    Affects.MEMORY: "the memory that a trial is estimated to need",
    Affects.RESULT: "what a trial computes: a checkpoint is for one value, and an exported adapter's card shows it",
    Affects.STUDY: "what a study asks: it stays as it is once the study has begun",
}

HEAD = """# Keys

Every setting of lorasweep. `key=value` on the command line sets one, a sweep file's `overrides` set some;
`python -m lorasweep keys WORD` finds them in the terminal. All but `search.*` are params of a trial's MLflow run.

`python docs/generate.py` writes this page from lorasweep/config/spec.py.

What a key may affect:

"""

COLUMNS = ("key", "default", "takes", "affects", "meaning")


@dataclass(frozen=True)
class Key:
    path: str
    """`lora.r`."""
    group: str
    """`lora`; "" for a key outside all groups."""
    default: str
    """As YAML has it."""
    allowed: str
    """What it takes, in words."""
    affects: tuple[str, ...]
    """Out of base, tokens, memory, result and study."""
    meaning: str


def described_keys() -> list[Key]:
    """Return every key, those outside groups first."""
    out = list(_described("", TrialSpec))
    for group, section in SECTIONS.items():
        out += _described(group, section)
    return out


def _described(group: str, section: type) -> Iterator[Key]:
    texts, hints = texts_below_fields(spec), get_type_hints(section)
    for setting in fields(section):
        path = f"{group}.{setting.name}" if group else setting.name
        if path not in spec.known_keys():  # a group, or the overrides that a trial was made from
            continue
        yield Key(
            path=path,
            group=group,
            default=json.dumps(setting.default),
            allowed=allowed(hints[setting.name], setting.metadata),
            affects=tuple(str(what.name).lower() for what in affects(setting)),
            meaning=texts.get((section.__name__, setting.name), ""),
        )


def page() -> str:
    """Return docs/keys.md."""
    effects = [f"- **{str(what.name).lower()}**: {text}." for what, text in EFFECTS.items()]
    parts = [HEAD + "\n".join(effects) + "\n"]
    for group, keys in groupby(described_keys(), key=lambda key: key.group):
        parts.append(f"## {group or 'The study'}\n\n{_table(list(keys))}\n")
    return "\n".join(parts)


def _table(keys: Sequence[Key]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    for key in keys:
        rows.append((f"`{key.path}`", f"`{key.default}`", key.allowed, ", ".join(key.affects), key.meaning))
    return "\n".join(map(_markdown_row, rows))


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

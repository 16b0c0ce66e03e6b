"""Texts that lie in a folder for each class, a file a text, as IMDb's reviews and 20 Newsgroups do."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from lorasweep.config.spec import DataSpec
from lorasweep.data import files
from lorasweep.data.table import USUAL_SPLITS, WHOLE, Row, Table
from lorasweep.errors import ConfigError

SUFFIXES = (".txt", "")
"""How the files end; 20 Newsgroups' have numbers for names."""
UNLABELLED = ("unsup", "unlabeled", "unlabelled")
"""Folders beside the classes that hold texts of none."""
SPLITS = frozenset({"train", "training", *USUAL_SPLITS["eval"], *USUAL_SPLITS["test"]})


def classes(folder: Path) -> list[Path]:
    """Return the folders of a folder's classes, [] where it does not consist of such."""
    inner = [p for p in _folders(folder) if p.name.lower() not in UNLABELLED]
    return inner if len(inner) > 1 and all(_holds_texts(p, p.stat().st_mtime_ns) for p in inner) else []


def splits(folder: Path, named: Mapping[str, str]) -> dict[str, Path]:
    """Return split -> a folder of class folders: those that are named so, or the folder itself as train.

    {} where it is none. Raises ConfigError where a split that was asked for is not there.
    """
    found = {name: place for name, split in named.items() if (place := _split(folder, split)) is not None}
    if "train" in found:
        for name, words in USUAL_SPLITS.items():
            place = next(filter(None, (_split(folder, word) for word in words)), None)
            if name not in named and place is not None:
                found[name] = place
    elif (names := {p.name.lower() for p in classes(folder)}) and not names & SPLITS:
        found["train"] = folder
    missing = [name for name in named if name not in found]
    if "train" in found and missing:
        inner = ", ".join(p.name for p in _folders(folder))
        raise ConfigError(
            [
                f"data.{name}_split: no folder '{named[name]}' with a folder for each class in {folder}; it has {inner}"
                for name in missing
            ]
        )
    return found


def _split(folder: Path, word: str) -> Path | None:
    """Return the folder of a split: that name, or the only one that ends in it."""
    inner = _folders(folder)
    exact = [p for p in inner if p.name == word]
    ending = exact or [p for p in inner if p.name.lower().endswith((f"-{word}", f"_{word}"))]
    return ending[0] if len(ending) == 1 and classes(ending[0]) else None


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if e.is_dir() and not e.name.startswith((".", "_")))


@lru_cache(maxsize=1000)
def _holds_texts(folder: Path, changed_ns: int) -> bool:
    """Tell whether a folder holds files of text and nothing else; asked again where files came or went since."""
    with os.scandir(folder) as entries:
        seen = [(os.path.splitext(e.name)[1].lower() in SUFFIXES, e.is_file()) for e in entries if e.name[0] != "."]
    return bool(seen) and all(map(all, seen))


def _texts(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return sorted(Path(e.path) for e in entries if not e.name.startswith("."))


def stamp(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return for each class its folder, the bytes of its texts and their latest times of change."""
    out = []
    for inner in classes(folder):
        stats = [p.stat() for p in _texts(inner)]
        content, record = (max(times) for times in zip(*((s.st_mtime_ns, s.st_ctime_ns) for s in stats), strict=True))
        out.append((f"{inner} ({len(stats)} files)", sum(s.st_size for s in stats), content, record))
    return out


def read(folder: Path, spec: DataSpec) -> Table:
    """Return a row a file: its text, and its folder's name as label. What is empty or no text counts as a bad row."""
    table = Table(columns=["text", "label"])
    guessed: list[str] = []
    for inner in classes(folder):
        for path in _texts(inner):
            try:
                text, notes = files.text_of(path, spec.encoding)
            except ConfigError as error:
                table.broken.append(error.problems[0].removeprefix("data.path: "))
                continue
            guessed += notes
            table.rows.append(Row({"text": text.strip(), "label": inner.name}, str(path), 1, WHOLE))
    table.notes = guessed[:1]
    if len(guessed) > 1:
        table.notes.append(f"the same or the like of {len(guessed) - 1} other files")
    left_out = [p.name for p in _folders(folder) if p.name.lower() in UNLABELLED]
    if left_out:
        table.notes.append(f"the folder {left_out[0]} holds no class and is not read")
    return table.bounded(folder)

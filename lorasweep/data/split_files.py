"""Which files a split is made of: one file, several parts of it, or a folder of them, in one of several layouts."""

import glob
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path

from lorasweep.config.spec import DataSpec
from lorasweep.data import class_folders
from lorasweep.data.files import COMPRESSED_SUFFIXES
from lorasweep.data.kinds import suffix_of
from lorasweep.data.table import USUAL_SPLITS
from lorasweep.errors import ConfigError

SAVED = ("state.json", "dataset_info.json", "dataset_dict.json")
"""Files that datasets' `save_to_disk` leaves."""


def is_saved(folder: Path) -> bool:
    """Tell whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def split_files(spec: DataSpec, ends: Collection[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return split -> files, and what was found without being asked for. Raises ConfigError for what is missing."""
    path = Path(str(spec.path)).expanduser()
    wanted = {"train": spec.train_split, "eval": spec.eval_split, "test": spec.test_split}
    named = {name: split for name, split in wanted.items() if split}
    if not path.exists() and glob.has_magic(str(path)):
        return _of_pattern(path, named)
    if not path.exists() and re.match(r"(https?|s3|gs|hdfs|ftp):/", str(spec.path)):
        raise ConfigError([f"data.path: {spec.path} is a web address; download the file and name it here"])
    if not path.exists():
        hub = "; for a data set of the hub give data=hub" if spec.source == "auto" and len(path.parts) <= 2 else ""
        raise ConfigError([f"data.path: no file or folder '{path}' (looked from {Path.cwd()}){hub}"])
    if path.is_dir() and is_saved(path):
        return _saved(path, named)
    if path.is_dir() and ".txt" in ends and (by_class := class_folders.splits(path, named)):
        return {name: [place] for name, place in by_class.items()}, [_by_class(path, by_class)]
    folder = path.parent if path.is_file() else path
    present = _present(folder, ends)
    found: dict[str, list[Path]] = {}
    problems: list[str] = []
    for name, split in named.items():
        if path.is_file() and name == "train":
            found[name] = [path]
            continue
        parts = _parts(folder, split, present)
        if not parts and name == "train" and len(named) == 1:
            parts = _all_of_one_kind(present)
        if parts:
            found[name] = parts
        else:
            problems.append(_no_match(name, split, folder, present, ends))
    if problems:
        raise ConfigError(problems)
    notes = _unnamed(path, named, present, found) if path.is_dir() else []
    return found, notes


def _by_class(path: Path, by_class: Mapping[str, Path]) -> str:
    names = [p.name for p in class_folders.classes(by_class["train"])]
    parts = [f"{name}: {place.name}" for name, place in by_class.items() if place != path]
    more = f", {', '.join(parts)}" if parts else ""
    return f"a folder for each class, a file for each text ({', '.join(names[:5])}{', ...' * (len(names) > 5)}){more}"


def _present(folder: Path, ends: Collection[str]) -> list[Path]:
    """Return the data files of a folder, or of its subfolder `data` where it has none, as a clone of a hub's has."""
    for place in (folder, folder / "data"):
        files = sorted(p for p in place.iterdir() if _is_data(p, ends)) if place.is_dir() else []
        deeper = sorted(p for p in place.glob("*/*") if _is_data(p, ends)) if place.is_dir() else []
        if files or deeper:
            return files or deeper
    return []


def _is_data(path: Path, ends: Collection[str]) -> bool:
    hidden = path.name.startswith((".", "_")) or path.name in SAVED or path.stem.lower() in ("readme", "license")
    return suffix_of(path) in ends and path.is_file() and not hidden


def _stem(path: Path) -> str:
    name = path.name
    for end in COMPRESSED_SUFFIXES:
        name = name.removesuffix(end)
    return Path(name).stem


def _parts(folder: Path, split: str, present: Sequence[Path]) -> list[Path]:
    """Return the files of a split: that name, its numbered parts, its folder, or the one file whose name holds it."""
    if (folder / split).is_file():
        return [folder / split]
    exact = [p for p in present if _stem(p) == split]
    if exact:
        return exact
    numbered = re.compile(re.escape(split) + r"[-_.]?(part[-_.]?)?\d+([-_]of[-_]\d+)?")
    parts = [p for p in present if numbered.fullmatch(_stem(p))]
    parts = parts or [p for p in present if p.parent != folder and p.parent.name == split]
    parts = parts or [p for p in present if split in _stem(p)]
    return parts if len(_patterns(parts)) == 1 else []


def _patterns(files: Sequence[Path]) -> set[str]:
    """Return the files' names with their numbers taken out: parts of one split have one."""
    return {re.sub(r"\d+", "#", p.name) for p in files}


def _all_of_one_kind(present: Sequence[Path]) -> list[Path]:
    """Return all files where there is one, or where they are numbered parts."""
    return list(present) if len(_patterns(present)) == 1 else []


def _no_match(name: str, split: str, folder: Path, present: Sequence[Path], ends: Collection[str]) -> str:
    matching = [p.name for p in present if split in _stem(p)]
    found = ", ".join(matching) or "none"
    files = ", ".join(p.name for p in present) or f"no {' or '.join(dict.fromkeys(ends))} file"
    return f"data.{name}_split: '{split}' must match one file in {folder}, matched {found}; it has {files}"


def _unnamed(path: Path, named: dict[str, str], present: Sequence[Path], found: dict[str, list[Path]]) -> list[str]:
    """Add the splits that a folder holds under their usual names; return notes on it."""
    notes = []
    for name, words in USUAL_SPLITS.items():
        if name in named:
            continue
        for word in words:
            parts = [p for p in _parts(path, word, present) if _names(p, word) and p not in found.get("train", [])]
            if parts:
                found[name] = parts
                files = ", ".join(p.name for p in parts[:3])
                notes.append(f"{name}: {files}, found in the folder")
                break
    return notes


def _names(path: Path, word: str) -> bool:
    """Tell whether a file's name, or its folder's, holds a word by itself."""
    return bool(re.search(rf"(^|[^a-z]){word}([^a-z]|$)", f"{path.parent.name}/{_stem(path)}".lower()))


def _of_pattern(path: Path, named: dict[str, str]) -> tuple[dict[str, list[Path]], list[str]]:
    files = [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]
    if not files:
        raise ConfigError([f"data.path: no file matches '{path}' (looked from {Path.cwd()})"])
    found = {"train": files}
    problems = []
    for name, split in named.items():
        if name != "train":
            found[name] = _parts(files[0].parent, split, files)
            problems += [] if found[name] else [_no_match(name, split, files[0].parent, files, ())]
    if problems:
        raise ConfigError(problems)
    taken = set(chain.from_iterable(parts for name, parts in found.items() if name != "train"))
    found["train"] = [p for p in files if p not in taken]
    return found, []


def _saved(path: Path, named: dict[str, str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the folders of the splits that `save_to_disk` wrote; a data set without splits is train."""
    if (path / "state.json").is_file():
        return {"train": [path]}, []
    folders = {p.name: p for p in sorted(path.iterdir()) if (p / "state.json").is_file()}
    missing = [
        f"data.{name}_split: no split '{split}' in {path}; it has {', '.join(folders)}"
        for name, split in named.items()
        if split not in folders
    ]
    if missing:
        raise ConfigError(missing)
    found = {name: [folders[split]] for name, split in named.items()}
    notes = []
    for name, words in USUAL_SPLITS.items():
        word = next((w for w in words if w in folders), None)
        if name not in found and word:
            found[name] = [folders[word]]
            notes.append(f"{name}: the split {word} of the folder")
    return found, notes


def stamp(files: dict[str, list[Path]]) -> list[tuple[str, int, int, int]]:
    """Return path, size and times of change of all files, of their content and of their record on the disk: what tells
    that one has changed. Who puts another file there can set the first time (`cp -p`, `touch -r`), not the second.
    """
    members: list[Path] = []
    seen: list[tuple[str, int, int, int]] = []
    for path in chain.from_iterable(files.values()):
        if path.is_dir() and not is_saved(path):
            seen += class_folders.stamp(path)
        else:
            members += sorted(path.rglob("*")) if path.is_dir() else [path]
    return seen + [
        (str(p), s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in members if p.is_file() and (s := p.stat())
    ]

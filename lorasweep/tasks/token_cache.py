"""Examples that were made once for a data set, a tokenizer and a task's settings, in files that are mapped into memory.

<outputs>/.tokens/<key>/about.json    names of the inputs, checksums, what the task learned by encoding
                        <split>.ids.npy     [inputs, tokens of all examples], int32
                        <split>.places.npy  [examples, 5], int64: row, supervised, text_bytes, ends in the other two
                        <split>.rest.npy    target and info of all examples, pickled one by one

A folder is written under another name and then renamed, so that it is whole or not there. Unpickled are plain values
alone: nothing in these files can run.
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import logging
import pickle
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np

from lorasweep.config.fields import Affects
from lorasweep.config.spec import DataSpec, TrialSpec
from lorasweep.data.dataset import Record
from lorasweep.tasks.task import Example, Task

FOLDER = ".tokens"
MAKING = "making-"
"""Begins the name of a folder that is being written."""

PACKAGES = ("lorasweep", "transformers", "tokenizers")
OWN = ("spec", "tokenizer", "notes", "found")
"""Attributes of a task that encoding does not set."""

COLUMNS = ("ids", "places", "rest")
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError, EOFError)

log = logging.getLogger(__name__)

NO_EXAMPLES = ("__init__", "batches", "metric", "task_state", "token_cache")
"""Files of this room whose code decides nothing of the examples; a change of another one makes them again."""


class _Plain(pickle.Unpickler):
    """Reads numbers, texts, lists, tuples, dicts and the classes that a task's examples hold."""

    def __init__(self, content: bytes, held: Sequence[type]) -> None:
        super().__init__(io.BytesIO(content))
        self._held = {(cls.__module__, cls.__qualname__): cls for cls in held}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._held:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
        return self._held[module, name]


class Examples(Sequence[Example]):
    """The examples of a split, each made when it is asked for."""

    def __init__(
        self, names: Sequence[str], held: Sequence[type], ids: np.ndarray, places: np.ndarray, rest: np.ndarray
    ) -> None:
        self.names, self.held = list(names), tuple(held)
        self._ids, self._places, self._rest = ids, places, rest

    def __len__(self) -> int:
        return len(self._places)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return np.diff(self._places[:, 3], prepend=0).tolist()

    @property
    def highest_id(self) -> int:
        """The highest token id of all."""
        return int(self._ids[self.names.index("input_ids")].max(initial=0))

    @overload
    def __getitem__(self, i: int) -> Example: ...
    @overload
    def __getitem__(self, i: slice) -> list[Example]: ...
    def __getitem__(self, i: int | slice) -> Example | list[Example]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        k = range(len(self))[i]
        row, supervised, text_bytes, end, rest_end = self._places[k].tolist()
        start, rest_start = self._places[k - 1, 3:].tolist() if k else (0, 0)
        target, info = _Plain(self._rest[rest_start:rest_end].tobytes(), self.held).load()
        inputs = dict(zip(self.names, self._ids[:, start:end], strict=True))
        return Example(row, inputs, target, supervised, info, text_bytes)


# --- what a store is for ---------------------------------------------------------------------------------------------


def place(spec: TrialSpec, task: Task, tokenizer: Any, fingerprint: str) -> Path:
    """Return the folder of a trial's examples: another one for other data, tokenizers, settings or versions."""
    settings = spec.affecting(Affects.TOKENS)
    facts = {
        "data": fingerprint,
        "settings": [settings[section] for section in sorted(settings)],
        "task": task.name,
        "classes": getattr(task, "classes", None),  # in the order that a finished head has them
        "tokenizer": _tokenizer_digest(tokenizer),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "code": _digest(_code(task)),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return Path(spec.outputs).expanduser() / FOLDER / key


def _code(task: Task) -> list[Path]:
    """Return the files whose code makes a task's examples."""
    ours = {path for path in Path(__file__).parent.glob("*.py") if path.stem not in NO_EXAMPLES}
    return sorted(ours | {Path(inspect.getfile(cls)) for cls in type(task).__mro__ if issubclass(cls, Task)})


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of all that a tokenizer saves: vocabulary, rules, special tokens, chat template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return _digest(sorted(p for p in Path(folder).rglob("*") if p.is_file()))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path, held: Sequence[type]) -> tuple[dict[str, Sequence[Example]], dict[str, Any]] | None:
    """Return the examples of each split, and what the task learned by encoding; None where there is no whole store."""
    if not folder.is_dir():
        return None
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf8"))
        found: dict[str, Sequence[Example]] = {}
        for split, part in about["splits"].items():
            columns = [_mapped(folder / f"{split}.{name}.npy", part["checksums"][name]) for name in COLUMNS]
            found[split] = Examples(part["names"], held, *columns)
    except DAMAGED as error:
        log.warning("%s is damaged and is made again: %s", folder, error)
        return None
    return found, about


def tell(task: Task, tokenizer: Any, facts: Mapping[str, Any]) -> None:
    """Set what a task would have learned by encoding."""
    task.notes += facts["notes"]
    for name, value in facts["told"].items():
        setattr(task, name, tuple(value) if isinstance(value, list) else value)
    if hasattr(task, "tokenizer"):
        task.tokenizer = tokenizer


def _mapped(path: Path, checksum: int) -> np.ndarray:
    """Return an array whose bytes stay on disk until they are needed. Raises ValueError where they are not the ones
    that were written.
    """
    if _checksum(path) != checksum:
        raise ValueError(f"{path.name} does not hold what was written")
    return np.asarray(np.load(path, mmap_mode="c"))  # copy on write: torch wants arrays that could be written to


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(2**22):
            found = zlib.crc32(part, found)
    return found


# --- writing ---------------------------------------------------------------------------------------------------------


def encoded(
    task: Task, records: Mapping[str, Sequence[Record]], tokenizer: Any, spec: DataSpec
) -> tuple[dict[str, Sequence[Example]], dict[str, Any]]:
    """Return the examples of each split, encoded now, and what the task learned by it."""
    before, notes = dict(vars(task)), len(task.notes)
    same_rows = spec if spec.too_long == "error" else replace(spec, too_long="truncate")
    examples: dict[str, Sequence[Example]] = {
        split: task.encode(rows, tokenizer, spec if split == "train" else same_rows) for split, rows in records.items()
    }
    changed = {k: v for k, v in vars(task).items() if k not in OWN and before.get(k) != v}
    return examples, {"notes": task.notes[notes:], "told": changed}


def write(
    folder: Path, splits: Mapping[str, Sequence[Example]], facts: Mapping[str, Any], held: Sequence[type]
) -> bool:
    """Write a store; return whether it exists now. Without room, or the right to write, it does not."""
    part = folder.parent / f"{MAKING}{uuid.uuid4().hex}"
    try:
        part.mkdir(parents=True)
        about = {split: _write_split(part, split, examples, held) for split, examples in splits.items()}
        (part / "about.json").write_text(json.dumps({**facts, "splits": about}), encoding="utf8")
        _take_place(part, folder, held)
    except (OSError, pickle.PickleError) as error:
        log.warning("%s: the tokens are not kept (%s)", folder.parent, error)
        return (folder / "about.json").is_file()
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _take_place(part: Path, folder: Path, held: Sequence[type]) -> None:
    """Rename a store to its name, in place of a damaged one; where another process was faster, leave its store."""
    try:
        part.rename(folder)
    except OSError:
        if read(folder, held) is not None:
            return
        if not folder.exists():
            raise
        folder.rename(part / "damaged")
        part.rename(folder)
    shutil.rmtree(folder / "damaged", ignore_errors=True)


def _column(examples: Sequence[Example], name: str) -> np.ndarray:
    """Return an input of all examples, one behind the other."""
    return np.concatenate([np.asarray(e.inputs[name], dtype=np.int32) for e in examples])


def _write_split(part: Path, split: str, examples: Sequence[Example], held: Sequence[type]) -> dict[str, Any]:
    names = list(examples[0].inputs)
    ids = [_column(examples, name) for name in names]
    rest = [pickle.dumps((e.target, e.info), protocol=5) for e in examples]
    for text in rest:
        _Plain(text, held).load()  # raises now, not in the middle of training
    ends = np.cumsum([[len(e), len(r)] for e, r in zip(examples, rest, strict=True)], axis=0)
    places = np.array([[e.row, e.supervised, e.text_bytes] for e in examples])
    columns = np.stack(ids), np.hstack([places, ends]), np.frombuffer(b"".join(rest), dtype=np.uint8)
    checksums = {}
    for name, column in zip(COLUMNS, columns, strict=True):
        path = part / f"{split}.{name}.npy"
        np.save(path, column)
        checksums[name] = _checksum(path)
    return {"names": names, "checksums": checksums}

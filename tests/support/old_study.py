"""The study of an older lorasweep that lies in tests/fixtures, moved to where a test wants it."""

import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import torch

ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / "study_of_7e88fe4.tar.gz"


def unpack(place: Path) -> Path:
    """Unpack everything into `place`, write that folder over the recorded one, and return the study's folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(place, filter="data")
    recorded = json.loads((place / "made.json").read_text())["folder"]
    for path in (p for p in place.rglob("*") if p.is_file()):
        content = path.read_bytes()
        if recorded.encode() not in content:
            continue
        if path.suffix == ".db":
            _move_store(path, recorded, str(place))
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            torch.save(_moved(state, recorded, str(place)), path)
        else:
            path.write_bytes(content.replace(recorded.encode(), str(place).encode()))
    return place / "outputs" / "s"


def _move_store(path: Path, old: str, new: str) -> None:
    with sqlite3.connect(path) as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        for table in tables:
            for _, column, kind, *_ in store.execute(f"PRAGMA table_info({table})").fetchall():
                if "CHAR" in kind.upper() or "TEXT" in kind.upper():
                    changed = f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) WHERE instr("{column}", ?)'
                    store.execute(changed, (old, new, old))


def _moved(state: Any, old: str, new: str) -> Any:
    match state:
        case str():
            return state.replace(old, new)
        case dict():
            return {key: _moved(value, old, new) for key, value in state.items()}
        case list() | tuple():
            return type(state)(_moved(value, old, new) for value in state)
        case _:
            return state

"""The built-in corpus is read once on a machine and then kept."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasweep.data import builtin


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("LORASWEEP_CACHE", str(tmp_path))
    monkeypatch.setattr(builtin, "PACKAGES", ("urllib", "logging"))
    builtin.docstrings.cache_clear()
    yield tmp_path
    builtin.docstrings.cache_clear()


def _unread(monkeypatch: pytest.MonkeyPatch, view: str) -> None:
    def parsed() -> list[dict]:
        raise AssertionError("the corpus was parsed again")

    monkeypatch.setitem(builtin.VIEWS, view, parsed)


@pytest.mark.parametrize("view", builtin.VIEWS)
def test_kept_rows_are_the_parsed_ones(view: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = builtin.VIEWS[view]()
    assert builtin.rows(view) == parsed
    _unread(monkeypatch, view)
    assert builtin.rows(view) == parsed


def test_rows_are_read_anew_where_a_file_of_the_corpus_differs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = builtin.rows("labelled")
    monkeypatch.setattr(builtin, "PACKAGES", ("urllib",))
    builtin.docstrings.cache_clear()
    assert 0 < len(builtin.rows("labelled")) < len(rows)


@pytest.mark.parametrize("damage", ["", "{", json.dumps({"key": 1, "rows": []})])
def test_damaged_file_of_rows_is_replaced(damage: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = builtin.rows("labelled")
    (file,) = (place / "builtin").iterdir()
    file.write_text(damage)
    assert builtin.rows("labelled") == rows
    _unread(monkeypatch, "labelled")
    assert builtin.rows("labelled") == rows


def test_rows_are_there_where_no_cache_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORASWEEP_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(builtin, "PACKAGES", ("urllib",))
    builtin.docstrings.cache_clear()
    assert builtin.rows("labelled")
    builtin.docstrings.cache_clear()

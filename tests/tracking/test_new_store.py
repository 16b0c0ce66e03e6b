"""A SQLite store is made whole: by one of several makers at once, and anew where the making was cut short."""

import sqlite3
import threading

import pytest

from lorasweep.files import FileLock
from lorasweep.tracking import mlflow_store


def make(path) -> None:
    mlflow_store.load()
    with FileLock(path.with_name("lock")):
        mlflow_store._make_whole(path)


def experiments(path) -> int:
    connection = sqlite3.connect(path)
    count = connection.execute("SELECT count(*) FROM experiments").fetchone()[0]
    connection.close()
    return count


def test_two_makers_at_once_end_with_one_whole_store(tmp_path):
    path = tmp_path / "mlflow.db"
    threads = [threading.Thread(target=make, args=[path]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert experiments(path) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lock", "mlflow.db"]


@pytest.mark.parametrize("left", [b"", b"no database", "CREATE TABLE runs (run_uuid TEXT)"])
def test_half_made_store_is_set_aside_and_made_anew(tmp_path, left, new_store, monkeypatch):
    path = tmp_path / "mlflow.db"
    if isinstance(left, bytes):
        path.write_bytes(left)
    else:
        with sqlite3.connect(path) as connection:
            connection.execute(left)
    (tmp_path / ".mlflow.db.1.part").write_text("of a maker that was killed")
    make(path)
    assert experiments(path) == 1
    assert [p.name.partition("broken-")[0] for p in sorted(tmp_path.glob("mlflow.db*"))] == ["mlflow.db", "mlflow.db."]
    assert not list(tmp_path.glob(".*part*"))


def test_store_that_holds_runs_is_left_as_it_is(tmp_path):
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (run_uuid TEXT)")
        connection.execute("INSERT INTO runs VALUES ('1')")
    before = path.read_bytes()
    make(path)
    assert path.read_bytes() == before

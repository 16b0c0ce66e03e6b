"""Files written whole, and locks that end with their holder; on systems with flock and without."""

import ast
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lorasweep import files
from lorasweep.files import FileLock, read_json, replace_file, replacing

HOLDER = """
import sys, time
from pathlib import Path
from lorasweep import files
if sys.argv[2] == "windows":
    files.fcntl = None
lock = files.FileLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(params=["flock", "windows"])
def system(request, monkeypatch) -> str:
    """Let locks be made as on a system with flock, or as on Windows."""
    if request.param == "windows":
        monkeypatch.setattr(files, "fcntl", None)
    return request.param


def test_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, '{"old": 1}')
    with replacing(path, durable=True) as file:
        file.write(b'{"new')
        assert read_json(path) == {"old": 1}
        file.write(b'": 2}')
    assert read_json(path) == {"new": 2}
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, "{}")
    with suppress(OSError), replacing(path) as file:
        file.write(b"half")
        raise OSError("no space left")
    assert path.read_text() == "{}" and list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_write_into_one_file(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as first, replacing(path) as second:
        first.write(b'{"by": 1}')
        second.write(b'{"by": 2}')
    assert read_json(path) == {"by": 1}


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1]", "null"])
def test_file_without_an_object_is_read_as_none(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json") is None
    assert read_json(tmp_path / "b.json") is None


def test_lock_has_one_holder_at_a_time(tmp_path, system):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire(blocking=False)
    first.release()
    assert second.acquire(blocking=False)
    second.release()


def test_threads_take_turns(tmp_path, system):
    count = 0

    def add() -> None:
        nonlocal count
        for _ in range(20):
            with FileLock(tmp_path / "lock"):
                before = count
                time.sleep(0.0005)
                count = before + 1

    threads = [threading.Thread(target=add) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert count == 60


def test_killed_holder_frees_the_lock(tmp_path, system):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "lock"), system], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    lock = FileLock(tmp_path / "lock")
    assert not lock.acquire(blocking=False)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock.acquire(blocking=False)
    lock.release()


def at_import(tree: ast.Module) -> set[str]:
    """Return the modules that a file imports as it is imported, those aside whose absence it handles."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_package_needs_no_module_that_windows_lacks():
    lacking = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "posix"}
    package = Path(files.__file__).parent
    wrong = {str(p): at_import(ast.parse(p.read_text(encoding="utf8"))) & lacking for p in package.rglob("*.py")}
    assert {path: names for path, names in wrong.items() if names} == {}

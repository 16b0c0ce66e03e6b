"""Each worker takes a GPU that no other has: locks of this user alone, by the devices that CUDA lets it see."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorasweep.errors import ConfigError
from lorasweep.hardware import device

UUID = "8932f937-d72c-4106-c12f-20bd9faed9f6"


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (None, None),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        ("2, 0", ["2", "0"]),
        ("0,-1,1", ["0"]),
        ("1,1", []),
        (f"GPU-{UUID},1", [f"GPU-{UUID}", "1"]),
        ("GPU-8932f937", ["GPU-8932f937"]),
        (f"MIG-{UUID}", [f"MIG-{UUID}"]),
        (f"MIG-GPU-{UUID}/1/0", [f"MIG-GPU-{UUID}/1/0"]),
        ("0,x,1", ["0"]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(text, seen):
    assert device.visible_devices(text) == seen


@pytest.fixture
def two_gpus(monkeypatch, tmp_path):
    """Let torch see two devices; of MIG parts it tells the UUID of their GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return taken


@pytest.mark.parametrize(("visible", "uuids"), [(None, ["a", "b"]), (f"MIG-{UUID},MIG-GPU-{UUID}/1/0", ["a", "a"])])
def test_two_workers_take_two_devices(visible, uuids, two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=uuids[d]))
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with device.own(2), device.own(2):
        assert two_gpus == [0, 1]
    with device.own(2):
        assert two_gpus == [0, 1, 0]


def test_runtime_folder_is_this_users_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert device.runtime_folder() == tmp_path / "lorasweep"
    assert stat.S_IMODE((tmp_path / "lorasweep").stat().st_mode) == 0o700
    for nowhere in ("", "relative", str(tmp_path / "missing")):
        monkeypatch.setenv("XDG_RUNTIME_DIR", nowhere)
        monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
        assert device.runtime_folder() == tmp_path / f"lorasweep-{os.getuid()}"


@pytest.mark.parametrize("kind", ["link", "file", "writable"])
def test_folder_that_is_another_users_or_open_to_all_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"lorasweep-{os.getuid()}"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777)
    with pytest.raises(ConfigError, match="set XDG_RUNTIME_DIR"):
        device.runtime_folder()


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can become another user")
def test_second_user_of_a_machine_has_locks_too():
    code = (
        "import os, sys, tempfile; from lorasweep.hardware import device; from lorasweep.files import FileLock\n"
        "tempfile.gettempdir = lambda: sys.argv[1]\n"
        "os.setuid(int(sys.argv[2]))\n"
        "print(FileLock(device.runtime_folder() / 'gpu-a.lock').acquire(blocking=False))"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"} | {"PYTHONDONTWRITEBYTECODE": "1"}
    with tempfile.TemporaryDirectory() as shared:  # pytest's own folders let no other user in
        Path(shared).chmod(0o1777)
        for user in ("0", "65534"):
            command = [sys.executable, "-c", code, shared, user]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            assert done.stdout == "True\n", done.stderr

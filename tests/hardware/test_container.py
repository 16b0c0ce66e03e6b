"""Limits of control groups, version 1 and 2, as files tell them."""

from pathlib import Path

import pytest

from lorasweep.hardware import container


@pytest.fixture
def groups(tmp_path, monkeypatch):
    monkeypatch.setattr(container, "MOUNT", tmp_path / "mount")
    monkeypatch.setattr(container, "GROUPS", tmp_path / "groups")

    def write(lines: str, **files: str) -> None:
        (tmp_path / "groups").write_text(lines)
        for path, text in files.items():
            file = tmp_path / "mount" / Path(path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


def test_version_2_takes_the_limit_with_least_room_of_all_groups_around(groups):
    groups(
        "0::/pod/box\n",
        **{
            "memory.max": "max",
            "pod/memory.max": "1000",
            "pod/memory.current": "900",
            "pod/memory.stat": "anon 500\ninactive_file 300\n",
            "pod/box/memory.max": "800",
            "pod/box/memory.current": "100",
            "pod/box/memory.events": "oom 4\noom_kill 3\n",
            "pod/cpu.max": "max 100000",
            "pod/box/cpu.max": "150000 100000",
        },
    )
    assert container.memory() == container.Memory(1000, 600)
    assert container.memory().free == 400
    assert container.cpus() == 1.5
    assert container.oom_kills() == 3


def test_version_1_in_a_container_that_sees_its_group_at_the_top(groups):
    groups(
        "9:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n",
        **{
            "memory/memory.limit_in_bytes": "2000",
            "memory/memory.usage_in_bytes": "500",
            "memory/memory.stat": "total_inactive_file 100\n",
            "memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            "cpu,cpuacct/cpu.cfs_quota_us": "50000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
    )
    assert container.memory() == container.Memory(2000, 400)
    assert container.cpus() == 0.5
    assert container.oom_kills() == 2


@pytest.mark.parametrize("limit", ["max", "9223372036854771712", ""])
def test_no_limit_is_none(groups, limit):
    groups("0::/\n", **{"memory.max": limit, "memory.limit_in_bytes": limit, "cpu.cfs_quota_us": "-1"})
    assert container.memory() is None and container.cpus() is None and container.oom_kills() == 0


def test_system_without_groups_has_no_limit(groups):
    assert container.memory() is None and container.cpus() is None and container.oom_kills() == 0

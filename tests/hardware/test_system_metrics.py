"""System metrics: MLflow's names, each look once a trial, at next to no cost, and GPUs only where they are."""

import json
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lorasweep.config import compose
from lorasweep.hardware import system_metrics
from lorasweep.tracking import runs

NAMES = {
    "system/cpu_utilization_percentage",
    "system/system_memory_usage_megabytes",
    "system/system_memory_usage_percentage",
}


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def seen(watch: system_metrics.Watch, than: float) -> system_metrics.Look:
    deadline = time.monotonic() + 10
    while (look := watch.newer(than)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return look


def test_a_look_goes_along_with_the_next_point_and_only_once(tmp_path):
    watch = system_metrics.Watch(first_s=0.05, interval_s=60)
    run = runs.TrialRun(tmp_path, machine=watch)
    run.metrics(1, {"train_loss": 0.5})
    seen(watch, 0.0)
    run.metrics(2, {"train_loss": 0.5})
    run.metrics(3, {"train_loss": 0.5})
    run.close("FINISHED")
    found = [{k for k in line if k.startswith("system/")} for line in lines(tmp_path)]
    assert [f >= NAMES for f in found] == [False, True, False]
    assert lines(tmp_path)[1]["train_loss"] == 0.5
    assert 0 < lines(tmp_path)[1]["system/system_memory_usage_percentage"] < 100


def test_a_step_has_one_look_however_long_it_takes(tmp_path):
    """Losses, metrics and costs of a step are three points, and a slow machine is looked at in between."""
    watch = system_metrics.Watch(first_s=0.02, interval_s=0.02)
    run = runs.TrialRun(tmp_path, machine=watch, after=3)
    for step, values in (
        (3, {"params_r": 1}),
        (4, {"train_loss": 0.5}),
        (4, {"eval_loss": 0.4}),
        (5, {"train_loss": 0.3}),
    ):
        seen(watch, time.monotonic())
        run.metrics(step, values)
    run.close("FINISHED")
    found = [any(k.startswith("system/") for k in line) for line in lines(tmp_path)]
    assert found == [False, True, False, True]


def test_a_look_costs_less_than_a_thousandth_of_its_interval():
    watch = system_metrics.Watch(first_s=60)
    began = time.process_time()
    for _ in range(100):
        watch.look()
    assert (time.process_time() - began) / 100 < system_metrics.INTERVAL_S / 1000


@pytest.mark.parametrize(("value", "watched"), [("true", True), ("false", False)])
def test_switch_turns_them_off(value, watched, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "_sender", lambda uri: SimpleNamespace(submit=lambda box: None))
    spec = compose.compose_trial([f"outputs={tmp_path}", f"tracking.system_metrics={value}"])
    run = runs.start_trial(tmp_path, spec, None, "0", {})
    assert (run._machine is not None) == watched


class NVMLError(Exception):
    pass


def nvml(count: int, broken: bool = False) -> ModuleType:
    """Return a stand-in for NVIDIA's library."""

    def start() -> None:
        if broken:
            raise NVMLError("no driver")

    def power(device: int) -> int:
        if device == 1:
            raise NVMLError("not supported")
        return 250_000

    found = ModuleType("pynvml")
    vars(found).update(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: count,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda device: SimpleNamespace(gpu=93),
        nvmlDeviceGetPowerUsage=power,
    )
    return found


def test_gpu_is_told_where_its_driver_tells(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml(2))
    values = system_metrics.Watch(first_s=60).look().values
    assert {k: v for k, v in values.items() if k not in NAMES} == {
        "system/gpu_0_memory_usage_megabytes": 20_000,
        "system/gpu_0_memory_usage_percentage": 25,
        "system/gpu_0_utilization_percentage": 93,
        "system/gpu_0_power_usage_watts": 250,
    }


@pytest.mark.parametrize("library", [None, nvml(1, broken=True)])
def test_without_library_or_driver_there_is_no_gpu(library, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", library)
    assert set(system_metrics.Watch(first_s=60).look().values) == NAMES

"""What the machine does while trials train: CPU, memory and GPUs, under the names that MLflow's own charts look for.

One thread a process looks every INTERVAL_S; a trial's log takes the latest look along with its next point.
"""

import os
import threading
import time
from dataclasses import dataclass
from typing import Any

import psutil

from lorasweep.hardware.energy import nvidia

FIRST_S = 2.0
"""Seconds to the first look: CPU load is that since the look before."""
INTERVAL_S = 10.0
"""Seconds between looks."""


@dataclass(frozen=True)
class Look:
    taken: float
    """On the monotonic clock."""
    values: dict[str, float]


class Watch:
    """The thread that looks, and what it saw last."""

    def __init__(self, first_s: float = FIRST_S, interval_s: float = INTERVAL_S) -> None:
        self._last: Look | None = None
        self._nvml, self._devices = _gpus()
        waits = (first_s, interval_s)
        threading.Thread(target=self._run, args=waits, name="lorasweep-system", daemon=True).start()

    def newer(self, than: float) -> Look | None:
        """Return the last look, None where it was taken before `than`."""
        last = self._last
        return last if last is not None and last.taken > than else None

    def look(self) -> Look:
        """Return what the machine does now."""
        memory = psutil.virtual_memory()
        values = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / 1e6,
            "system/system_memory_usage_percentage": memory.percent,
        }
        for i, device in enumerate(self._devices):
            values |= _gpu(self._nvml, i, device)
        return Look(time.monotonic(), values)

    def _run(self, first_s: float, interval_s: float) -> None:
        psutil.cpu_percent()  # the first one of a thread has nothing to compare with
        wait = first_s
        while True:
            time.sleep(wait)
            self._last = self.look()
            wait = interval_s


def _gpus() -> tuple[Any, list[Any]]:
    """Return NVIDIA's library and its devices; none where the library or a device is not there."""
    nvml = nvidia()
    if nvml is None:
        return None, []
    try:
        return nvml, [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return nvml, []


def _gpu(nvml: Any, index: int, device: Any) -> dict[str, float]:
    """Return what one GPU does; {} where its driver does not say."""
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(device)
        busy = nvml.nvmlDeviceGetUtilizationRates(device).gpu
        watts = nvml.nvmlDeviceGetPowerUsage(device) / 1000
    except nvml.NVMLError:
        return {}
    return {
        f"system/gpu_{index}_memory_usage_megabytes": memory.used / 1e6,
        f"system/gpu_{index}_memory_usage_percentage": 100 * memory.used / memory.total,
        f"system/gpu_{index}_utilization_percentage": float(busy),
        f"system/gpu_{index}_power_usage_watts": watts,
    }


_watches: list[Watch] = []
if hasattr(os, "register_at_fork"):  # a thread does not come along into a fork
    os.register_at_fork(after_in_child=_watches.clear)


def watch() -> Watch:
    """Return this process's watch."""
    if not _watches:
        _watches.append(Watch())
    return _watches[0]

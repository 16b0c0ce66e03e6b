"""Energy of the GPUs, where their driver counts it: NVIDIA's, from Volta on. Owner of NVIDIA's library."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class Energy:
    """A counter over some devices. All trials of a pass share what it shows, as they share its seconds."""

    def __init__(self, devices: "Sequence[torch.device]") -> None:
        self._nvml, self._handles = _handles(devices)
        self._last = self._now()

    @property
    def is_known(self) -> bool:
        return self._last is not None

    def used(self) -> float:
        """Return the joules since the last call; 0 where the driver does not tell."""
        before, self._last = self._last, self._now()
        if before is None or self._last is None:
            self._last = None  # half a count is none
            return 0.0
        return self._last - before

    def _now(self) -> float | None:
        if not self._handles:
            return None
        try:
            return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in self._handles) / 1000
        except self._nvml.NVMLError:
            return None


def nvidia() -> Any | None:
    """Return NVIDIA's library, ready to be asked, or None where it or the driver is not there."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml


def _handles(devices: "Sequence[torch.device]") -> tuple[Any, list[Any]]:
    """Return NVIDIA's library and its handles of the devices; no handles where one is no GPU of theirs.

    CUDA counts the devices that it is shown, the driver all: they are matched by their names for good.
    """
    nvml = None if any(d.type != "cuda" for d in devices) else nvidia()
    if nvml is None:
        return None, []
    try:
        import torch

        names = [f"GPU-{torch.cuda.get_device_properties(d).uuid}" for d in devices]
        return nvml, [nvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    except nvml.NVMLError:
        return nvml, []

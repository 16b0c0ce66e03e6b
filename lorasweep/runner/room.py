"""Room on the disk: what a study will write, whether there is that much, and the wait for more where it is full."""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from lorasweep.config.spec import TrialSpec
from lorasweep.study.study import Study

MIB = 2**20
OTHER_BYTES = MIB
"""What a trial leaves beside its adapter: points, predictions, log."""
SPARE_BYTES = 16 * MIB
"""Of the queue, MLflow's store and the report."""
COPIES_OF_STATE = 4
"""A checkpoint holds what trains, its two moments, and what trained as it was at the best evaluation."""
LOOK_EVERY_S = 5.0


def expected_bytes(specs: Sequence[TrialSpec], adapter_bytes: int, full_bytes: int, trials: int) -> int:
    """Return the most bytes that a study of these trials writes: adapters, which stay until all have ended, their
    copies in MLflow, and checkpoints of what runs at once, each beside the one that it replaces.

    `adapter_bytes` is the size of the largest adapter, `full_bytes` that of what full fine-tuning trains.
    """
    largest = max(specs, key=lambda s: s.lora.r)
    tracking = largest.tracking
    copied = trials if tracking.enabled and tracking.save_adapters == "all" else 1
    running = min(trials, largest.search.workers * (largest.train.fixed_slots or 1))
    checkpoints = (running * adapter_bytes + full_bytes) * COPIES_OF_STATE * 2
    return (trials + copied) * adapter_bytes + checkpoints + trials * OTHER_BYTES + SPARE_BYTES


def existing(path: Path) -> Path:
    """Return a folder, or the innermost one around it that is there."""
    return path if path.exists() or path == path.parent else existing(path.parent)


def free_bytes(path: Path) -> int:
    """Return what is free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(existing(path)).free


def told(needed: int, outputs: Path) -> str:
    """Return what is needed and what is free, in words."""
    return (
        f"about {needed / MIB:,.0f} MiB at the most in {outputs}, {free_bytes(outputs) / MIB:,.0f} MiB are free there"
    )


def problem(needed: int, outputs: Path) -> list[str]:
    """Return a problem where a study will not have the room that it needs."""
    if free_bytes(outputs) >= needed:
        return []
    return [f"outputs: the study needs {told(needed, outputs)}; free some, or set outputs=FOLDER on another disk"]


def needed_to_go_on(study: Study) -> int:
    """Return what the workers of a running study need for what they write next, going by what they have written."""
    files = [p for p in study.folder.glob("*/checkpoint.pt")] + [p for p in study.folder.glob("*/adapter/*")]
    largest = max((p.stat().st_size for p in files), default=0)
    return 2 * study.search.workers * largest + SPARE_BYTES


def wait(study: Study, is_stopped: Callable[[], bool]) -> bool:
    """Wait, where the study's disk is full, until it is not; say so once. Return whether it was full."""
    needed = needed_to_go_on(study)
    if free_bytes(study.folder) >= needed:
        return False
    print(
        f"paused, the disk is full: the study needs {told(needed, study.folder)}; it goes on by itself once they are "
        "free, or after Ctrl-C with `resume`",
        flush=True,
    )
    while free_bytes(study.folder) < needed and not is_stopped():
        time.sleep(LOOK_EVERY_S)
    return True


def tidy(folder: Path) -> None:
    """Remove what a killed process left half written in a folder that is ours now."""
    for part in folder.glob("*.part"):
        part.unlink(missing_ok=True)

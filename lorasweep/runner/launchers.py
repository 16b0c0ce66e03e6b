"""Hydra's launchers: where workers run and what a launcher lacks."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from lorasweep.config.overrides import Override, key_of, override_text
from lorasweep.hardware import container

Launch = Callable[[Callable[[Any], None], int], None]
"""(what each worker does, how many workers): returns when all have ended, raises what one of them raised."""


def here(work: Callable[[Any], None], count: int) -> None:
    """Launch one worker in this process, without Hydra."""
    work(None)


SUBMITIT = (
    "hydra.launcher.timeout_min=10080",
    "hydra.launcher.submitit_folder={jobs}",
    "+hydra.launcher.setup=[\"trap '' INT\"]",
)
"""A week, not Hydra's hour. A worker begins deaf to SIGINT, then listens itself: submitit passes each one on twice."""

LAUNCHER_NEEDS = {
    "joblib": ("hydra.launcher.n_jobs={workers}",),
    "submitit_local": SUBMITIT,
    "submitit_slurm": SUBMITIT[:2],
}
"""Settings of a launcher, unless the user gives others."""

RAY_HERE = ("+hydra.launcher.ray.init.num_cpus={workers}",)
RAY_CLUSTER = (
    "+hydra.launcher.ray.init.object_store_memory=null",
    "+hydra.launcher.ray.remote.scheduling_strategy=SPREAD",
)
"""Ray refuses a size for an object store that already exists; workers go to all nodes."""


def launcher_overrides(own: Sequence[str], workers: int, folder: Path) -> list[str]:
    """Return Hydra's overrides for this many workers: joblib unless a launcher is chosen; [] for one worker here."""
    given = dict(Override.of(word) for word in own)
    chosen = given.get("hydra/launcher")
    if chosen is None and workers == 1:
        return list(own)
    launcher = chosen or "joblib"
    needed = LAUNCHER_NEEDS.get(launcher, ())
    if launcher == "ray":
        needed = RAY_CLUSTER if "hydra.launcher.ray.init.address" in given else RAY_HERE
    jobs = override_text(f"{folder}/submitit/%j")
    extra = [word.format(workers=workers, jobs=jobs) for word in needed if key_of(word) not in given]
    return [*own, *([] if chosen else ["hydra/launcher=joblib"]), *extra]


def is_in_small_container() -> bool:
    """Return whether a container gives less memory than the machine has: then the kernel kills who takes too much."""
    limit = container.memory()
    return limit is not None and limit.limit < psutil.virtual_memory().total


def is_launchers(word: str) -> bool:
    """Return whether an override is Hydra's own, for a launcher."""
    return key_of(word).startswith(("hydra/", "hydra."))


def is_elsewhere(launcher: Sequence[str]) -> bool:
    """Return whether the launcher's workers run on other machines than this one, which may have no GPU."""
    given = dict(Override.of(word) for word in launcher)
    return given.get("hydra/launcher") == "submitit_slurm" or "hydra.launcher.ray.init.address" in given

"""Calling Hydra, for the sake of its launchers, and the sweeper that it calls back with `-m`."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from lorasweep.config import compose
from lorasweep.config.registry import data_folder
from lorasweep.errors import ConfigError
from lorasweep.runner import launchers
from lorasweep.runner.launchers import Launch
from lorasweep.runner.worker_process import Workers, is_apart
from lorasweep.study.meta import StudyMeta


@dataclass
class SweeperConf:
    _target_: str = "hydra_plugins.lorasweep_sweeper.LorasweepSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="lorasweep", node=SweeperConf, provider="lorasweep")


class LorasweepSweeper(Sweeper):
    """Runs `plan` with whatever launcher Hydra is configured with."""

    plan: ClassVar[Callable[[Launch], int] | None] = None
    """What `launched` has prepared: given a way to launch, it returns the exit code."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def sweep(self, arguments: list[str]) -> int:
        """Carry the plan out; leave the process with its exit code."""
        assert LorasweepSweeper.plan is not None, "`launched` sets the plan before it calls Hydra"
        sys.exit(LorasweepSweeper.plan(self._launch))

    def _launch(self, work: Callable[[Any], None], count: int) -> None:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=work, config=self._config
        )
        for job in launcher.launch([[] for _ in range(count)], initial_job_idx=0):
            _ = job.return_value  # raises what the worker raised


def launched(
    plan: Callable[[Launch], int], meta: StudyMeta, folder: Path, workers: Workers, *, through_hydra: bool = False
) -> int:
    """Carry a plan out with the launcher that the study in `folder` asks for; return its exit code.

    Without one, `workers` are processes of this machine; or this one, where it has torch and a single worker is enough.
    """
    count = meta.search["workers"]
    if meta.launcher:
        workers.close()  # they would hold memory while others train
    elif is_apart(count):
        workers.size = count
        return plan(workers.launch)
    own = launchers.launcher_overrides(meta.launcher, count, folder.resolve())
    if not own and not through_hydra:
        return plan(launchers.here)
    LorasweepSweeper.plan = staticmethod(plan)
    return call_hydra(["-m", *own])


def call_hydra(words: Sequence[str]) -> int:
    """Hand a command line to Hydra; return the exit code."""
    compose.import_plugins()
    compose.register_schemas()

    @hydra.main(config_path=str(data_folder("conf")), config_name="config", version_base="1.3")
    def task(_: object) -> None:
        raise ConfigError(["-m is missing: Hydra's other flags run nothing"])

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to `main` as they are
    sys.argv = ["lorasweep", *words]
    try:
        task()
    except SystemExit as end:  # the sweeper's way out of Hydra, with the exit code
        return int(end.code or 0)
    return 0

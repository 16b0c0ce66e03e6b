"""The sweeper that Hydra calls with `-m`."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from lorasweep.runner.launchers import Launch


@dataclass
class SweeperConf:
    _target_: str = "hydra_plugins.lorasweep_sweeper.LorasweepSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="lorasweep", node=SweeperConf, provider="lorasweep")


class LorasweepSweeper(Sweeper):
    """Runs `plan` with whatever launcher Hydra is configured with."""

    plan: ClassVar[Callable[[Launch], int] | None] = None
    """What cli.py has prepared: given a way to launch, it returns the exit code."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def sweep(self, arguments: list[str]) -> int:
        """Carry the plan out; leave the process with its exit code."""
        assert LorasweepSweeper.plan is not None, "cli.py sets the plan before it calls Hydra"
        sys.exit(LorasweepSweeper.plan(self._launch))

    def _launch(self, work: Callable[[Any], None], count: int) -> None:
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self._context, task_function=work, config=self._config
        )
        for job in launcher.launch([[] for _ in range(count)], initial_job_idx=0):
            _ = job.return_value  # raises what the worker raised

"""What hydra_plugins hands Hydra: override strings become a study, and workers run it."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from lorasweep.errors import ConfigError

EXIT_OK, EXIT_FAILED_TRIALS = 0, 3


@dataclass
class SweeperConf:
    _target_: str = "hydra_plugins.lorasweep_sweeper.LorasweepSweeper"


ConfigStore.instance().store(group="hydra/sweeper", name="lorasweep", node=SweeperConf, provider="lorasweep")


class LorasweepSweeper(Sweeper):
    """Makes the study and launches workers through whatever launcher Hydra is configured with."""

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self._context = hydra_context
        self._config = config

    def sweep(self, arguments: list[str]) -> int:
        """Run the study; leave the process with its exit code."""

        def launch(work: Callable[[Any], None]) -> None:
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=self._context, task_function=work, config=self._config
            )
            for job in launcher.launch([[]], initial_job_idx=0):
                _ = job.return_value  # raises what the worker raised

        sys.exit(run_study(arguments, launch))


def _shared_metric(metrics: Sequence[str]) -> str:
    """Return the metric that ranks all trials. Raises ConfigError where they have different ones."""
    found = list(dict.fromkeys(metrics))
    if len(found) > 1:
        raise ConfigError(
            [f"task_type: trials of one study are ranked by one metric, got {', '.join(found)}; sweep them apart"]
        )
    return found[0]


def run_study(overrides: Sequence[str], launch: Callable[[Callable[[Any], None]], None]) -> int:
    """Validate every point, make the study, let `launch` run a worker, show the outcome; return the exit code.

    Raises ConfigError, with the problems of all points, before anything is written.
    """
    from lorasweep import compose, group, provenance, report, space, tasks, tracking
    from lorasweep.study import Study, StudyMeta, new_name
    from lorasweep.worker import Worker, score_winner

    grid = space.grid(overrides)
    specs = compose.compose_points(grid.lines, grid.problems)
    loaded = group.preflight(specs)
    first = specs[0]
    metric = _shared_metric([s.task_type.primary or loaded[group.key(s)].task.primary for s in specs])
    name = first.study or new_name(grid.swept)
    folder = Path(first.outputs) / name
    command = f"python -m lorasweep {' '.join(overrides)}"
    meta = StudyMeta(
        name=name,
        swept=grid.swept,
        overrides=list(overrides),
        metric=metric,
        maximize=tasks.maximize(metric),
        mlflow_parent=None,
        created=provenance.now(),
    )
    study = Study.create(folder, meta, grid.points, grid.lines)
    study.set_parent(tracking.open_study(first, name, f"`{command}`"))
    print(f"study {name}: {len(specs)} trial{'s' if len(specs) != 1 else ''}, {folder}", flush=True)
    launch(lambda _: Worker(study, loaded).run())
    test = score_winner(study, loaded)
    states = [t.state.name for t in study.trials()]
    failed = states.count("FAIL")
    best = study.best()
    scores = {f"test_{k}": v for k, v in test.items()}
    if best is not None and best.value is not None:
        scores |= {f"best_eval_{metric}": best.value, "best_trial": best.number}
    tracking.close_study(first, study.meta.mlflow_parent, scores, ok=not failed)
    report.show(study, test, first.outputs)
    return EXIT_FAILED_TRIALS if failed else EXIT_OK

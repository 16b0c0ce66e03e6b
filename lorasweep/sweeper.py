"""From override strings to a study that runs: validate every point, fill the queue, launch workers, show the outcome.

hydra_plugins hands LorasweepSweeper to Hydra, for the sake of its launchers: each worker is one job of one launch.
"""

import functools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig

from lorasweep.errors import ConfigError
from lorasweep.interrupt import EXIT_INTERRUPTED

EXIT_OK, EXIT_FAILED_TRIALS = 0, 3
LAUNCHES_WITHOUT_PROGRESS = 3
POLL_S = 1.0

Launch = Callable[[Callable[[Any], None], int], None]
"""(what each worker does, how many workers): returns when all have ended, raises what one of them raised."""


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


def here(work: Callable[[Any], None], count: int) -> None:
    """Launch one worker in this process, without Hydra."""
    work(None)


SUBMITIT = (
    "hydra.launcher.timeout_min=10080",
    "hydra.launcher.submitit_folder={folder}/submitit/%j",
    "+hydra.launcher.setup=[\"trap '' INT\"]",
)
"""A week, not Hydra's hour. A worker begins deaf to SIGINT, then listens itself: submitit passes each one on twice."""

LAUNCHER_NEEDS = {
    "joblib": ("hydra.launcher.n_jobs={workers}",),
    "submitit_local": SUBMITIT,
    "submitit_slurm": SUBMITIT[:2],
}
"""What a launcher has to be told, unless the user says otherwise."""

RAY_HERE = ("+hydra.launcher.ray.init.num_cpus={workers}",)
RAY_CLUSTER = (
    "+hydra.launcher.ray.init.object_store_memory=null",
    "+hydra.launcher.ray.remote.scheduling_strategy=SPREAD",
)
"""Ray refuses a size for a store that is there already; workers go to all nodes."""


def launcher_overrides(own: Sequence[str], workers: int, folder: Path) -> list[str]:
    """Return Hydra's overrides for so many workers: joblib unless a launcher is chosen; [] for one worker here."""
    chosen = next((o.split("=")[1] for o in own if o.startswith("hydra/launcher=")), None)
    if chosen is None and workers == 1:
        return list(own)
    launcher = chosen or "joblib"
    given = {o.split("=")[0].lstrip("+") for o in own}
    needed = LAUNCHER_NEEDS.get(launcher, ())
    if launcher == "ray":
        needed = RAY_CLUSTER if "hydra.launcher.ray.init.address" in given else RAY_HERE
    extra = [o.format(workers=workers, folder=folder) for o in needed if o.split("=")[0].lstrip("+") not in given]
    return [*own, *([] if chosen else ["hydra/launcher=joblib"]), *extra]


# --- making a study --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A study that is valid, and not yet made."""

    folder: Path
    meta: Any
    queue: list[Any]
    loaded: Mapping[str, Any]
    first: Any
    """The spec of its first trial."""
    never: Sequence[str] = ()
    """What is to be said of points that need more memory than allowed, a line each."""


def plan(overrides: Sequence[str], space: Mapping[str, Any] | None = None, question: str = "") -> Plan:
    """Validate a study. Raises ConfigError, with the problems of all points, before anything is written."""
    from lorasweep import compose, group, provenance, storage, tasks, tracking
    from lorasweep import space as spaces
    from lorasweep.meta import StudyMeta, new_name

    overrides = [storage.keep_password(tracking.keep_credentials(o)) for o in overrides]
    own = [o for o in overrides if is_launchers(o)]
    overrides = [_from_anywhere(o) for o in overrides]
    found, problems = spaces.read([o for o in overrides if o not in own], space)
    lines, entries = _points(found, problems)
    specs = compose.compose_points(lines, problems)
    loaded = group.preflight(specs, here := not is_elsewhere(own))
    never = _never(specs, loaded, found.keys) if here else []
    first = specs[0]
    metric = _shared_metric([s.task_type.primary or loaded[group.key(s)].task.primary for s in specs])
    search = asdict(first.search)
    search["warm_start"] = [str(Path(f).resolve()) for f in first.search.warm_start or []] or None
    name = first.study or new_name(found.keys)
    direction = first.search.direction
    maximize = tasks.maximize(metric) if direction == "auto" else direction == "maximize"
    _teachers(first.search, metric, maximize)
    meta = StudyMeta(
        name=name,
        swept=found.keys,
        overrides=[o for o in overrides if o not in own],
        metric=metric,
        maximize=maximize,
        created=provenance.now(),
        question=first.search.question or question,
        space=found.describe(),
        search=search,
        outputs=first.outputs,
        launcher=own,
        storage=search["storage"],
    )
    return Plan(
        Path(first.outputs).resolve() / name,
        meta,
        entries,
        loaded,
        first,
        never,
    )


def _never(specs: Sequence[Any], loaded: Mapping[str, Any], swept: Sequence[str]) -> list[str]:
    """Return a line for each point that search.max_memory_gib rules out. Raises ConfigError where it leaves none."""
    from lorasweep import group, memory

    lines = []
    for number, spec in enumerate(specs):
        work = loaded[group.key(spec)]
        why = memory.hopeless(spec, work.task, work.tokenizer, work.examples)
        if why:
            point = " ".join(o for o in spec.overrides if o.split("=")[0] in swept) or "as it is"
            lines.append(f"point {number} ({point}) {why}")
    if lines and len(lines) == len(specs):
        raise ConfigError([f"search.max_memory_gib: no trial is left; {line}" for line in lines])
    return lines


def is_launchers(override: str) -> bool:
    """Return whether an override is Hydra's own, for a launcher."""
    return override.lstrip("+~").startswith(("hydra/", "hydra."))


def is_elsewhere(launcher: Sequence[str]) -> bool:
    """Return whether the launcher's workers run on other machines than this one, which may have no GPU."""
    far = ("hydra/launcher=submitit_slurm", "hydra.launcher.ray.init.address=")
    return any(o.lstrip("+").startswith(far) for o in launcher)


def _from_anywhere(override: str) -> str:
    """Return an override that names a file or folder here by its full path: workers may run elsewhere."""
    key, _, value = override.partition("=")
    if key in ("data.path", "model.pretrained") and value and Path(value).exists():
        return f"{key}={Path(value).resolve()}"
    return override


def _points(found: Any, problems: list[str]) -> tuple[list[list[str]], list[Any]]:
    """Return the override lines to validate and the queue's entries: all points of a grid, or a sampler's blanks."""
    from lorasweep import compose, search
    from lorasweep.meta import Entry
    from lorasweep.study import DEFAULT_TRIALS

    try:
        base = compose.compose_trial(found.fixed).search
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    recipes = [split_point(found, text.split()) for text in base.enqueue or []]
    lines = [found.line(given) + extra for given, extra in recipes]
    if base.sampler == "grid":
        try:
            points = found.grid()[: base.trials]
        except ConfigError as error:
            raise ConfigError([*problems, *error.problems]) from None
        entries = [Entry(line, given) for line, (given, _) in zip(lines, recipes, strict=True)]
        done = [given for given, extra in recipes if not extra]
        entries += [Entry(found.line(p), dict(p)) for p in points if p not in done]
        return [e.overrides or [] for e in entries], entries
    problems += search.problems(base, found)
    if not found.keys and not problems:
        problems.append(f"search.sampler: {base.sampler} needs something to vary, e.g. lora.r=4,8,16")
    given_first = [Entry(given=given, extra=extra) for given, extra in recipes]
    blanks = [Entry()] * ((base.trials or DEFAULT_TRIALS) - len(recipes))
    return [found.line(p) for p in found.corners()] + lines, given_first + blanks


def split_point(found: Any, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values that overrides give to the space's keys, and the overrides it has no place for."""
    given, extra = {}, []
    for override in overrides:
        key = override.split("=")[0]
        value = found.value_of(override) if "=" in override else None
        if key in found.keys and found.contains({key: value}):
            given[key] = value
        else:
            extra.append(override)
    return given, extra


def _shared_metric(metrics: Sequence[str]) -> str:
    """Return the metric that ranks all trials. Raises ConfigError where they have different ones."""
    found = list(dict.fromkeys(metrics))
    if len(found) > 1:
        raise ConfigError(
            [f"task_type: trials of one study are ranked by one metric, got {', '.join(found)}; sweep them apart"]
        )
    return found[0]


# --- running it ------------------------------------------------------------------------------------------------------


def run_study(planned: Plan, launch: Launch) -> int:
    """Make the study, run it, show the outcome; return the exit code."""
    from lorasweep.study import Study

    return run_made(Study.create(planned.folder, planned.meta, planned.queue), planned, launch)


def run_made(study: Any, planned: Plan, launch: Launch) -> int:
    """Run a study that has just been made; return the exit code."""
    from lorasweep import tracking

    for line in planned.never if planned.meta.search["sampler"] == "grid" else ():  # else no trial is at those points
        print(line, flush=True)
    command = shlex.join(["python", "-m", "lorasweep", "-m", *planned.meta.overrides])
    note = f"{planned.meta.question}\n\n`{command}`".strip()
    study.set_parent(tracking.open_study(planned.first, planned.meta.name, note))
    return carry_on(study, launch, planned.loaded)


def _teachers(search: Any, metric: str, maximize: bool) -> list[Any]:
    """Return the studies of search.warm_start. Raises ConfigError where one is missing or judged otherwise."""
    from lorasweep.study import Study

    found, problems = [], []
    for folder in search.warm_start or []:
        try:
            other = Study.open(Path(folder).resolve())
        except ConfigError as error:
            problems += [f"search.warm_start: {p}" for p in error.problems]
            continue
        if (other.meta.metric, other.meta.maximize) != (metric, maximize):
            problems.append(f"search.warm_start: {folder} is ranked by {other.meta.metric}, not {metric}")
        elif (other.search.objectives or []) != (search.objectives or []):
            problems.append(f"search.warm_start: {folder} has other search.objectives: {other.search.objectives}")
        found.append(other)
    if problems:
        raise ConfigError(problems)
    return found


def _warm_start(study: Any) -> None:
    """Let the sampler see the finished trials of earlier studies, once."""
    from lorasweep.study import ENDED

    if study.warmed():
        return
    for other in _teachers(study.search, study.meta.metric, study.meta.maximize):
        taken = study.take_in([t for t in other.trials() if t.state in ENDED and t.values], origin=str(other.folder))
        print(f"warm start: {len(taken)} of {len(other.trials())} trials of {other.meta.name} lie in this space")
    study.set_warmed()


def carry_on(study: Any, launch: Launch, loaded: Mapping[str, Any]) -> int:
    """Run what is left of a study and show the outcome; return the exit code."""
    from lorasweep import display, interrupt, repeats, worker

    total = len(study.trials())
    print(
        f"study {study.meta.name}: {total} trial{'s' if total != 1 else ''}, {display.shown(study.folder)}", flush=True
    )
    _warm_start(study)
    study.begin()
    worker.prepare(study, loaded)
    with interrupt.heard(lambda: study.stop(None, "Ctrl-C")) as interrupts:
        _run_workers(study, launch, interrupts)
        while not _stopped(study, interrupts) and (again := repeats.next_round(study)):
            count = f"{len(again)} trials run" if len(again) > 1 else "1 trial runs"
            print(f"repeats: {count} again with another seed", flush=True)
            _run_workers(study, launch, interrupts)
    if _stopped(study, interrupts):
        print(
            f"stopped, nothing is lost; go on with: python -m lorasweep resume {display.shown(study.folder)}",
            flush=True,
        )
        return EXIT_INTERRUPTED
    return finish(study, loaded)


def _stopped(study: Any, interrupts: Any) -> bool:
    return bool(interrupts.count) or "all" in study.stops()


def _run_workers(study: Any, launch: Launch, interrupts: Any) -> None:
    """Launch workers until nothing is left: a launcher whose process was killed may take the other workers with it."""
    from lorasweep import device, tracking, worker

    idle = 0
    work = functools.partial(_work, str(study.folder), not device.threads_are_given())
    while not _stopped(study, interrupts):
        worker.settle(study)
        if not study.waiting() or study.spent():
            if not study.running():
                return
            time.sleep(POLL_S)  # somebody else's workers are still at it
            continue
        before = _state(study)
        failure: Exception | None = None
        try:
            launch(work, max(1, study.search.workers - study.alive()))
        except ConfigError:
            raise
        except Exception as error:  # a launcher's own error, or a worker's: what it had goes back
            failure = error
            told = tracking.redact(str(error))
            print(f"a worker ended: {type(error).__name__}: {told.splitlines()[0] if told else ''}")
        idle = idle + 1 if _state(study) == before else 0
        if idle >= LAUNCHES_WITHOUT_PROGRESS or worker.is_fatal(failure):
            raise failure or RuntimeError(f"workers end without running a trial; see {study.folder}")


def _state(study: Any) -> list[tuple]:
    keys = ("checkpoint_step", "deaths")
    return [(t.number, t.state, *(t.user_attrs.get(k) for k in keys)) for t in study.trials()]


def _work(folder: str, divide: bool, config: Any) -> None:
    """What a launcher runs in each worker's process."""
    from lorasweep import worker

    worker.run_worker(folder, divide)


def _settle_adapters(study: Any, spec: Any) -> None:
    """Log the winner as an MLflow model, then leave the adapters that tracking.save_adapters keeps."""
    from lorasweep import clean, registry

    told = registry.log_winner(study, spec)
    if told:
        print(told)
    clean.tidy(study, spec.tracking)


def finish(study: Any, loaded: Mapping[str, Any]) -> int:
    """Score the winner on the test split, close the study in MLflow, print the table; return the exit code."""
    from lorasweep import answer, outcome, page, report, tracking

    test = outcome.score_winner(study, loaded)
    failed = study.failed()
    found = answer.answer(study)
    scores = {f"test_{k}": v for k, v in test.items()}
    if found.best is not None:
        scores |= {f"best_eval_{study.meta.metric}": found.best.value, "best_trial": found.best.number}
    if found.best is not None and found.best.standard_error is not None:
        scores[f"best_eval_{study.meta.metric}_standard_error"] = found.best.standard_error
    answer.write_best(study, found)
    page.write_if_possible(study, found)
    spec = study.spec(study.space.fixed)
    tracking.close_study(spec, study.meta.mlflow_parent, scores, ok=not failed, folder=study.folder)
    report.show(study, test, study.meta.outputs, found, spec.tracking)
    _settle_adapters(study, spec)
    if study.waiting():
        print(f"{study.waiting()} trials were not begun: {study.spent()}")
    return EXIT_FAILED_TRIALS if failed else EXIT_OK

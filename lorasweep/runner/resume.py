"""Steering a study from another terminal: status, add, stop; and going on: resume, work, extend, sync."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasweep import console, tasks
from lorasweep.config import compose, trust
from lorasweep.config.fields import Affects
from lorasweep.config.overrides import is_of_the_study, key_of, keys_of, overlaid, override_text, without
from lorasweep.config.spec import SearchSpec, keys_affecting
from lorasweep.data import dataset
from lorasweep.errors import ConfigError, StudyMismatch
from lorasweep.hardware import container
from lorasweep.runner import interrupt, launch, plan, reclaim
from lorasweep.runner.request import Request
from lorasweep.search import choice, space
from lorasweep.search.choice import DEFAULT_TRIALS
from lorasweep.search.order import ENDED
from lorasweep.study import repeats
from lorasweep.study.meta import Entry
from lorasweep.study.result import read_result, write_result
from lorasweep.study.study import Study

# --- going on --------------------------------------------------------------------------------------------------------


def resume(study: Study, overrides: Sequence[str], *, failed: bool = False, changed_data: bool = False) -> None:
    """Make a study ready to go on; `overrides` may change search.* keys that do not change what was asked.

    Raises StudyMismatch where the overrides give another space or another configuration, with the difference; and
    where a file of the data has changed, unless `changed_data` takes it as it is now.
    """
    study.refuse_code()
    changed = [o for o in overrides if o.startswith("search.")]
    others = [o for o in overrides if o not in changed]
    if others:
        _refuse_other_space(study, overlaid(study.meta.overrides, others))
    _look_at_data(study, changed_data)
    if changed:
        _change_search(study, changed)
    if failed:
        again = [t for t in study.failed() if "overrides" in t.user_attrs]
        study.queue.enqueue([_again(t) for t in again])


def _look_at_data(study: Study, accepted: bool) -> None:
    """Raises StudyMismatch where the rows are not those that the study began with, unless that is accepted."""
    now, problems = _data_now(study)
    if problems and not accepted:
        raise _other_data(study, problems)
    if now != study.meta.data:
        study.change_data(now)


def _other_data(study: Study, problems: Sequence[str]) -> StudyMismatch:
    way_out = "trials on other rows do not compare; put the file back, or go on with resume --changed-data"
    return StudyMismatch("\n  ".join([f"{console.shown(study.folder)}: its data are others", *problems, way_out]))


def _data_now(study: Study) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what the study's data are now, and which of them are others than when it began.

    Files of the same size and times are not read again.
    """
    now, problems = [], []
    for entry in study.meta.data:
        spec = study.spec(entry["overrides"])
        files = dataset.files_seen(spec.data)
        before, after = entry["fingerprint"], entry["fingerprint"]
        if files != entry["files"] or not files:
            from lorasweep.training import workload  # loads torch

            after = workload.load_rows(spec, tasks.make(spec.task_type)).fingerprint
        if after != before:
            problems.append(f"data.path: {spec.data.path} has changed: fingerprint {before[:12]}, now {after[:12]}")
        now.append(entry | {"fingerprint": after, "files": files})
    return now, problems


def _again(trial: Any) -> Entry:
    known = trial.user_attrs
    return Entry(
        known["overrides"],
        known["swept"],
        start_from=known.get("start_from"),
        retry_of=trial.number,
        repeat_of=known.get("repeat_of"),
        repeat=known.get("repeat", 0),
    )


def _refuse_other_space(study: Study, overrides: Sequence[str]) -> None:
    new, problems = space.read(overrides)
    if problems:
        raise ConfigError(problems)
    keys = keys_of(overrides)
    old = replace(study.space, dimensions=tuple(d for d in study.space.dimensions if d.key in keys))
    found = space.differences(old, new)
    if found:
        folder = console.shown(study.folder)
        way_out = f"copy its trials into a new study with: python -m lorasweep extend {folder} study=NAME ..."
        raise StudyMismatch("\n  ".join([f"{folder} asks something else", *found, way_out]))


def _change_search(study: Study, overrides: Sequence[str]) -> None:
    """Store changed search.* keys. Raises StudyMismatch for those that a study keeps, before anything is stored."""
    keys = [key_of(o).removeprefix("search.") for o in overrides]
    settled = [k for k in keys if f"search.{k}" in keys_affecting(Affects.STUDY)]
    if settled:
        raise StudyMismatch(f"search.{settled[0]}: cannot change in a study that has begun; use extend")
    asked = compose.compose_trial([*_search_overrides(study.meta.search), *overrides])
    now = asdict(choice.settled(asked.search, study.space))
    more: list[Entry] = []
    if "trials" in keys and now["trials"] is not None:
        have = len([t for t in study.trials() if repeats.is_searched(t)])
        if now["trials"] < have:
            raise StudyMismatch(f"search.trials: the queue has {have} trials already; stop some of them one by one")
        if study.search.sampler != "grid":
            more = [Entry()] * (_room(study, now["trials"]) - have)
        else:
            known = [t.user_attrs["swept"] for t in study.trials()]
            points = [p for p in study.space.grid()[: now["trials"]] if p not in known]
            more = [Entry(study.space.line(p), dict(p)) for p in points]
    study.change_search({k: now[k] for k in keys})
    study.queue.enqueue(more)


def _room(study: Study, wanted: int) -> int:
    """Return how many trials of the search there can be, at most `wanted`: a point is trained once."""
    every = study.space.points(wanted)
    if every is None:
        return wanted
    trials = [t for t in study.trials() if repeats.is_searched(t)]
    inside = [t for t in trials if "extra" not in t.user_attrs and t.state.name != "FAIL"]
    room = len(trials) - len(inside) + max(len(every), len(inside))
    if room < wanted:
        print(
            f"{', '.join(study.space.keys)}: there are {len(every)} points to try, so there are {room} trials at most"
        )
    return min(room, wanted)


def _search_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return search.* overrides of what differs from the defaults."""
    default = asdict(SearchSpec())
    return [f"search.{k}={override_text(v)}" for k, v in values.items() if v != default[k]]


def work(study: Study) -> int:
    """Run trials of a study in this process until none is left; return the exit code."""
    study.refuse_code()
    _, problems = _data_now(study)  # not stored: each machine that works has its own times of the files
    if problems:
        raise _other_data(study, problems)
    print(f"study {study.meta.name}: {study.queue.waiting()} trials wait", flush=True)
    with interrupt.heard() as interrupts:
        while not interrupts.count and "all" not in study.signals.stops():
            reclaim.settle(study)
            if study.ready():
                from lorasweep.runner import worker  # loads torch

                worker.run_worker(str(study.folder), not container.threads_are_given(), study.trusted)
            elif study.queue.running():
                time.sleep(2)  # its owner may die
            else:
                return launch.EXIT_FAILED_TRIALS if study.failed() else launch.EXIT_OK
    print(f"stopped, nothing is lost; {study.queue.waiting()} trials wait", flush=True)
    return interrupt.EXIT_INTERRUPTED


def extend(old: Study, request: Request, look: plan.Look) -> plan.Plan:
    """Return the plan of a new study with another space; `take_over` gives it the old one's ended trials.

    Raises ConfigError where no new name is given, and StudyMismatch where trials would be judged otherwise.
    """
    old.refuse_code()
    if "study" not in keys_of(request.overrides):
        raise ConfigError(["study: give the new study a name, e.g. study=rank-2"])
    search = {k: v for k, v in old.meta.search.items() if k not in ("enqueue", "warm_start")}
    before = [o for o in old.meta.overrides if not o.startswith("search.")] + _search_overrides(search)
    overrides = overlaid(before, request.overrides)
    launcher = request.launcher
    if "hydra/launcher" not in keys_of(launcher):
        if not old.trusted:
            trust.refuse_commands(old.meta.launcher, old.folder)
        launcher = overlaid(old.meta.launcher, launcher)
    dimensions = {d.key: d.as_yaml() for d in old.space.dimensions if d.key not in keys_of(overrides)}
    planned = plan.plan(Request(overrides, launcher, dimensions, old.meta.question), look=look)
    judged = ("metric", "maximize")
    differ = [k for k in judged if getattr(planned.meta, k) != getattr(old.meta, k)]
    if planned.meta.search["objectives"] != old.meta.search["objectives"]:
        differ.append("search.objectives")
    if differ:
        raise StudyMismatch(f"{', '.join(differ)}: the trials of {old.meta.name} were judged otherwise")
    return planned


def take_over(old: Study, planned: plan.Plan) -> Study:
    """Make the new study with the old one's ended trials, folders too, and queue what they leave open."""
    study = Study.create(planned.folder, planned.meta, [])
    ended = [t for t in old.trials() if t.state in ENDED and t.state.name != "FAIL"]
    done = []
    for trial in ended:
        if not _same_otherwise(trial, study):
            continue
        for number in study.queue.take_in([trial], None):
            done.append(trial.user_attrs["swept"])
            _copy_folder(old.trial_folder(trial.number), study.trial_folder(number), number)
    print(f"extend: {len(done)} of {len(ended)} trials of {old.meta.name} lie in the new space", flush=True)
    queue = [e for e in planned.queue if e.overrides is None or e.given not in done]
    if planned.meta.search["sampler"] != "grid":
        wanted = planned.meta.search["trials"] or DEFAULT_TRIALS
        queue = queue[: max(0, wanted - len(done))]
    study.queue.enqueue(queue)
    return study


def _same_otherwise(trial: Any, new: Study) -> bool:
    """Return whether a trial's configuration, what the new space varies aside, is the new study's."""
    if "start_from" in trial.user_attrs:
        return False
    varied = set(new.space.keys)

    def rest(overrides: Sequence[str]) -> set[str]:
        return {o for o in without(overrides, varied) if not is_of_the_study(key_of(o))}

    return rest(trial.user_attrs["overrides"]) == rest(new.space.fixed)


def _copy_folder(old: Path, new: Path, number: int) -> None:
    """Copy what a trial left, without its MLflow run, under its new number."""
    if not old.is_dir():
        return
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("mlflow.json", ".mlflow.lock", "*.part"))
    result = read_result(new)
    if result is not None:
        write_result(new, replace(result, number=number))

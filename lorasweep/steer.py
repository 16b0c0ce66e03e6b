"""Steering a study from another terminal: status, add, stop; and going on: resume, work, extend, sync."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorasweep import (
    compose,
    device,
    display,
    group,
    interrupt,
    outcome,
    race,
    registry,
    space,
    sweeper,
    tracking,
    worker,
)
from lorasweep.errors import ConfigError, StudyMismatch
from lorasweep.meta import Entry
from lorasweep.space import Space
from lorasweep.spec import NAME_RULE, SearchSpec, is_name
from lorasweep.study import DEFAULT_TRIALS, ENDED, Study

SETTLED = ("sampler", "question", "objectives", "direction", "storage", "enqueue", "warm_start")
"""search.* keys that `resume` does not change."""


def find(words: Sequence[str]) -> tuple[Study, list[str]]:
    """Return the study that the first word names, by folder, by name or by database URL, and the other words.

    Raises ConfigError where it names none.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError(["name a study first: its folder, e.g. outputs/NAME, or postgresql://... study=NAME"])
    first, rest = words[0], [tracking.keep_credentials(w) for w in words[1:]]
    outputs = next((w.split("=", 1)[1] for w in rest if w.startswith("outputs=")), "./outputs")
    if first.startswith("postgresql://"):
        from lorasweep import storage

        name = next((w.split("=", 1)[1] for w in rest if w.startswith("study=")), "")
        if not is_name(name):
            raise ConfigError([f"study: {NAME_RULE}, got '{name}'; name the database's study with study=NAME"])
        rest = [w for w in rest if w.split("=")[0] not in ("study", "outputs")]
        return Study.join(storage.keep_password(first), name, Path(outputs)), rest
    folder = (Path(first) if Path(first).is_dir() else Path(outputs) / first).resolve()
    if not folder.is_dir():
        there = sorted(p.parent.name for p in Path(outputs).glob("*/study.json"))
        raise ConfigError([f"{first}: no such study; in {outputs} there are {', '.join(there[-8:]) or 'none'}"])
    return Study.open(folder), [w for w in rest if not w.startswith("outputs=")]


# --- status ----------------------------------------------------------------------------------------------------------


def status(words: Sequence[str]) -> int:
    """Print a study's trials, again and again with --watch."""
    watch = "--watch" in words
    study, rest = find([w for w in words if w != "--watch"])
    if rest:
        raise ConfigError([f"{rest[0]}: status takes a study and --watch"], "the command line")
    while True:
        if watch:
            print("\x1b[2J\x1b[H", end="")
        _show(study)
        if not watch or not (study.waiting() + study.running()):
            return 0
        time.sleep(2)


def _show(study: Study) -> None:
    meta, trials = study.meta, study.trials()
    progress = {int(n): p for w in study.workers().values() for n, p in w["trials"].items()}
    columns = ["trial", *meta.swept, "state", "step", meta.metric, "seconds", "note"]
    display.table(f"study {meta.name}", columns, [_row(study, t, progress) for t in trials])
    states = [t.state.name.lower() for t in trials]
    counts = {s: states.count(s) for s in ("complete", "pruned", "fail", "running", "waiting")}
    print("  ".join(f"{n} {s}" for s, n in counts.items() if n))
    best = study.best()
    if best is not None:
        print(f"best: trial {best.number}, {meta.metric} {best.values[0]:.4f}")
    left = _time_left(study)
    if left is not None:
        print(f"about {left / 60:.0f} minutes left" if left > 90 else "less than two minutes left")
    if study.waiting() and study.spent():
        print(f"no more trials begin: {study.spent()}")
    elif (study.waiting() or study.running()) and not study.alive():
        print(f"no worker runs; go on with: python -m lorasweep resume {display.shown(study.folder)}")


def _row(study: Study, trial: Any, progress: Mapping[int, Mapping[str, float]]) -> list[str]:
    attributes = trial.user_attrs
    swept = attributes.get("swept", trial.params)
    last = max(trial.intermediate_values, default=None)
    value = trial.intermediate_values.get(last) if last is not None else None
    shown = progress.get(trial.number) if trial.state.name == "RUNNING" else None
    step = f"{shown['step']:.0f}/{shown['of']:.0f}" if shown else str(_last_step(attributes))
    return [
        str(trial.number),
        *[display.short(swept.get(k, "-")) for k in study.meta.swept],
        trial.state.name,
        step,
        f"{value:.4f}" if value is not None else "-",
        f"{attributes['device_s']:.1f}" if "device_s" in attributes else "-",
        str(attributes.get("reason") or ""),
    ]


def _last_step(attributes: Mapping[str, Any]) -> Any:
    return attributes.get("steps", attributes.get("checkpoint_step", "-"))


def _time_left(study: Study) -> float | None:
    """Return the seconds until the queue is empty at the pace so far; None where nothing tells."""
    spent = [t.user_attrs["device_s"] for t in study.trials() if t.state in ENDED and "device_s" in t.user_attrs]
    busy = max(1, study.running())
    left = study.waiting() + study.running() / 2
    return None if not spent or not left else left * sum(spent) / len(spent) / busy


# --- add and stop ----------------------------------------------------------------------------------------------------


def add(words: Sequence[str]) -> int:
    """Put one more trial at the head of the queue: of overrides, or a changed copy of another trial."""
    from_weights = "--from-weights" in words
    study, rest = find([w for w in words if w != "--from-weights"])
    like: int | None = None
    if "--like" in rest:
        at = rest.index("--like")
        like = _number(rest[at + 1 : at + 2])
        rest = rest[:at] + rest[at + 2 :]
    if from_weights and like is None:
        raise ConfigError(["--from-weights: needs --like NUMBER, the trial whose weights are taken over"])
    if not rest and like is None:
        raise ConfigError(["add: give overrides, e.g. lora.r=32, or --like NUMBER"], "the command line")
    number = study.enqueue([_entry(study, rest, like, from_weights)])[0]
    print(f"trial {number} waits at the head of the queue of {study.meta.name}")
    if not study.alive():
        print(f"no worker runs; start one with: python -m lorasweep resume {display.shown(study.folder)}")
    return 0


def _entry(study: Study, overrides: Sequence[str], like: int | None, from_weights: bool) -> Entry:
    """Return the queue entry of a trial given by hand. Raises ConfigError where it could not run."""
    base = list(study.space.fixed)
    if like is not None:
        origin = study.trial(like)
        if "overrides" not in origin.user_attrs:
            raise ConfigError([f"--like: trial {like} has not been drawn yet"])
        if from_weights and not (study.trial_folder(like) / "adapter").is_dir():
            raise ConfigError([f"--from-weights: trial {like} has left no adapter in {study.trial_folder(like)}"])
        base = list(origin.user_attrs["overrides"])
    given = {o.split("=")[0] for o in overrides}
    line = [o for o in base if o.split("=")[0] not in given] + list(overrides)
    spec = compose.compose_trial(line)
    loaded = group.preflight([spec], not sweeper.is_elsewhere(study.meta.launcher))
    metric = spec.task_type.primary or loaded[group.key(spec)].task.primary
    if metric != study.meta.metric:
        raise ConfigError([f"task_type: the study is ranked by {study.meta.metric}, this trial has {metric}"])
    keys = list(dict.fromkeys([*study.meta.swept, *given]))
    values = {k: _value(study.space, line, spec, k) for k in keys}
    return Entry(line, values, start_from=like if from_weights else None, added=True)


def _value(searched: Space, line: Sequence[str], spec: Any, key: str) -> Any:
    """Return what a trial has for a key: the override's value, the choice of that text, or the configured value."""
    for override in reversed(line):
        if override.split("=")[0] == key:
            return searched.value_of(override)
    section, _, name = key.partition(".")
    part = getattr(spec, section, None)
    value = getattr(part, name, None)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _number(words: Sequence[str]) -> int:
    if not words or not words[0].isdigit():
        raise ConfigError([f"give a trial's number (stop takes --all too), got {words[0] if words else 'none'}"])
    return int(words[0])


def stop(words: Sequence[str]) -> int:
    """End one trial as PRUNED, or with --all stop the study as one Ctrl-C does."""
    study, rest = find(words)
    if rest == ["--all"]:
        study.stop(None, "stop --all")
        print(f"{study.meta.name} stops; go on with: python -m lorasweep resume {display.shown(study.folder)}")
        return 0
    number = _number(rest)
    trial = study.trial(number)
    if trial.state in ENDED:
        raise ConfigError([f"{number}: this trial has ended, {trial.state.name}"])
    reason = " ".join(rest[1:]) or "asked for"
    reason = f"stopped by hand: {reason}"
    if study.end_waiting(number, reason):
        _leave_result(study, trial, reason)
    else:
        study.stop(number, reason)
    print(f"trial {number} ends as PRUNED")
    return 0


def _leave_result(study: Study, trial: Any, reason: str) -> None:
    """Write the result of a trial that ended while it waited; `sync` then ends its MLflow run, if it has one."""
    folder, known = study.trial_folder(trial.number), trial.user_attrs
    folder.mkdir(parents=True, exist_ok=True)
    told = {"overrides": known.get("overrides"), "params_swept": known.get("swept", {})}
    outcome.write(folder, {"number": trial.number, **told, "state": "PRUNED", "reason": reason})
    (folder / worker.CHECKPOINT).unlink(missing_ok=True)


# --- going on --------------------------------------------------------------------------------------------------------


def resume(study: Study, overrides: Sequence[str], *, failed: bool = False) -> None:
    """Make a study ready to go on; `overrides` may change search.* keys that do not change what was asked.

    Raises StudyMismatch where the overrides give another space or another configuration, with the difference.
    """
    changed = [o for o in overrides if o.startswith("search.")]
    others = [o for o in overrides if o not in changed]
    given = {o.split("=")[0] for o in others}
    before = [o for o in study.meta.overrides if o.split("=")[0] not in given]
    if others:
        _refuse_other_space(study, [*before, *others])
    if changed:
        _change_search(study, changed)
    if failed:
        again = [t for t in study.failed() if "overrides" in t.user_attrs]
        study.enqueue([_again(t) for t in again])


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
    keys = {o.split("=")[0] for o in overrides}
    old = replace(study.space, dimensions=tuple(d for d in study.space.dimensions if d.key in keys))
    found = space.differences(old, new)
    if found:
        folder = display.shown(study.folder)
        way_out = f"copy its trials into a new study with: python -m lorasweep extend {folder} study=NAME ..."
        raise StudyMismatch("\n  ".join([f"{folder} asks something else", *found, way_out]))


def _change_search(study: Study, overrides: Sequence[str]) -> None:
    """Store changed search.* keys. Raises StudyMismatch for those that a study keeps, before anything is stored."""
    keys = [o.split("=")[0].removeprefix("search.") for o in overrides]
    fixed = [k for k in keys if k in SETTLED]
    if fixed:
        raise StudyMismatch(f"search.{fixed[0]}: cannot change in a study that has begun; use extend")
    now = asdict(compose.compose_trial([*_search_overrides(study.meta.search), *overrides]).search)
    more: list[Entry] = []
    if "trials" in keys and now["trials"] is not None:
        have = len([t for t in study.trials() if not race.is_repeat(t)])
        if now["trials"] < have:
            raise StudyMismatch(f"search.trials: the queue has {have} trials already; stop some of them one by one")
        if study.search.sampler != "grid":
            more = [Entry()] * (now["trials"] - have)
        else:
            known = [t.user_attrs["swept"] for t in study.trials()]
            points = [p for p in study.space.grid()[: now["trials"]] if p not in known]
            more = [Entry(study.space.line(p), dict(p)) for p in points]
    study.change_search({k: now[k] for k in keys})
    study.enqueue(more)


def _search_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return search.* overrides of what differs from the defaults."""
    default = asdict(SearchSpec())
    return [f"search.{k}={compose.override_text(v)}" for k, v in values.items() if v != default[k]]


def work(study: Study) -> int:
    """Run trials of a study in this process until none is left; return the exit code."""
    print(f"study {study.meta.name}: {study.waiting()} trials wait", flush=True)
    with interrupt.heard() as interrupts:
        while not interrupts.count and "all" not in study.stops():
            worker.settle(study)
            if study.waiting() and not study.spent():
                worker.run_worker(str(study.folder), not device.threads_are_given())
            elif study.running():
                time.sleep(2)  # its owner may die
            else:
                return sweeper.EXIT_FAILED_TRIALS if study.failed() else sweeper.EXIT_OK
    print(f"stopped, nothing is lost; {study.waiting()} trials wait", flush=True)
    return interrupt.EXIT_INTERRUPTED


def extend(old: Study, overrides: Sequence[str]) -> sweeper.Plan:
    """Return the plan of a new study with another space; `take_over` gives it the old one's ended trials.

    Raises ConfigError where no new name is given, and StudyMismatch where trials would be judged otherwise.
    """
    if not any(o.startswith("study=") for o in overrides):
        raise ConfigError(["study: give the new study a name, e.g. study=rank-2"])
    search = {k: v for k, v in old.meta.search.items() if k not in ("enqueue", "warm_start")}
    before = [o for o in old.meta.overrides if not o.startswith("search.")] + _search_overrides(search)
    if any(o.startswith("hydra/launcher=") for o in overrides) is False:
        before += old.meta.launcher
    given = {o.split("=")[0] for o in overrides}
    kept = [o for o in before if o.split("=")[0] not in given]
    named = {o.split("=")[0] for o in kept} | given
    dimensions = {d.key: d.as_yaml() for d in old.space.dimensions if d.key not in named}
    planned = sweeper.plan([*kept, *overrides], dimensions, old.meta.question)
    judged = ("metric", "maximize")
    differ = [k for k in judged if getattr(planned.meta, k) != getattr(old.meta, k)]
    if planned.meta.search["objectives"] != old.meta.search["objectives"]:
        differ.append("search.objectives")
    if differ:
        raise StudyMismatch(f"{', '.join(differ)}: the trials of {old.meta.name} were judged otherwise")
    return planned


def take_over(old: Study, planned: sweeper.Plan) -> Study:
    """Make the new study with the old one's ended trials, folders too, and queue what they leave open."""
    study = Study.create(planned.folder, planned.meta, [])
    ended = [t for t in old.trials() if t.state in ENDED and t.state.name != "FAIL"]
    done = []
    for trial in ended:
        if not _same_otherwise(trial, study):
            continue
        for number in study.take_in([trial], None):
            done.append(trial.user_attrs["swept"])
            _copy_folder(old.trial_folder(trial.number), study.trial_folder(number), number)
    print(f"extend: {len(done)} of {len(ended)} trials of {old.meta.name} lie in the new space", flush=True)
    queue = [e for e in planned.queue if e.overrides is None or e.given not in done]
    if planned.meta.search["sampler"] != "grid":
        wanted = planned.meta.search["trials"] or DEFAULT_TRIALS
        queue = queue[: max(0, wanted - len(done))]
    study.enqueue(queue)
    return study


def _same_otherwise(trial: Any, new: Study) -> bool:
    """Return whether a trial's configuration, what the new space varies aside, is the new study's."""
    if "start_from" in trial.user_attrs:
        return False
    varied = set(new.space.keys)

    def rest(overrides: Sequence[str]) -> set[str]:
        own = [o for o in overrides if o.split("=")[0] not in varied]
        return {o for o in own if o.split(".")[0].split("=")[0] not in compose.NOT_PART_OF_A_TRIAL}

    return rest(trial.user_attrs["overrides"]) == rest(new.space.fixed)


def _copy_folder(old: Path, new: Path, number: int) -> None:
    """Copy what a trial left, without its MLflow run, under its new number."""
    if not old.is_dir():
        return
    shutil.copytree(old, new, ignore=shutil.ignore_patterns("mlflow.json", ".mlflow.lock", "*.part"))
    result = outcome.read(new)
    if result is not None:
        outcome.write(new, result | {"number": number})


def repair(words: Sequence[str]) -> int:
    """Send MLflow what it missed: points, runs, and the winner as a model where the study has ended.

    tracking.uri names another store, which is given everything. Returns 1 where MLflow did not take all of it.
    """
    study, rest = find(words)
    wrong = [w for w in rest if not w.startswith("tracking.uri=")]
    if wrong:
        raise ConfigError([f"sync: takes a study and tracking.uri=..., got '{wrong[0]}'"])
    spec = study.spec([*study.space.fixed, *rest])
    counts = tracking.sync(study.folder, spec)
    print(counts)
    over = not study.running() and (not study.waiting() or study.spent())
    told = registry.log_winner(study, spec) if over and not counts.failed else ""
    if told:
        print(told)
    return 1 if counts.failed or told.startswith(registry.NOT_LOGGED) else 0

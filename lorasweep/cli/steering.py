"""The commands that look at a running study and steer it: status, add, stop, sync."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorasweep import console
from lorasweep.config import compose
from lorasweep.config.spec import NAME_RULE, is_name
from lorasweep.credentials import keep_credentials
from lorasweep.errors import ConfigError
from lorasweep.runner import launchers, preflight
from lorasweep.search.space import Space
from lorasweep.serving import model_registry
from lorasweep.study.meta import Entry
from lorasweep.study.result import result_of, write_result
from lorasweep.study.study import ENDED, Study
from lorasweep.tracking import runs
from lorasweep.training import checkpoint, workload


def find(words: Sequence[str]) -> tuple[Study, list[str]]:
    """Return the study that the first word names, by folder, by name or by database URL, and the other words.

    Raises ConfigError where it names none.
    """
    if not words or words[0].startswith("-"):
        raise ConfigError(["name a study first: its folder, e.g. outputs/NAME, or postgresql://... study=NAME"])
    first, rest = words[0], [keep_credentials(w) for w in words[1:]]
    outputs = next((w.split("=", 1)[1] for w in rest if w.startswith("outputs=")), "./outputs")
    if first.startswith("postgresql://"):
        from lorasweep.credentials import keep_password

        name = next((w.split("=", 1)[1] for w in rest if w.startswith("study=")), "")
        if not is_name(name):
            raise ConfigError([f"study: {NAME_RULE}, got '{name}'; name the database's study with study=NAME"])
        rest = [w for w in rest if w.split("=")[0] not in ("study", "outputs")]
        return Study.join(keep_password(first), name, Path(outputs)), rest
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
    console.table(f"study {meta.name}", columns, [_row(study, t, progress) for t in trials])
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
        print(f"no worker runs; go on with: python -m lorasweep resume {console.shown(study.folder)}")


def _row(study: Study, trial: Any, progress: Mapping[int, Mapping[str, float]]) -> list[str]:
    attributes = trial.user_attrs
    swept = attributes.get("swept", trial.params)
    last = max(trial.intermediate_values, default=None)
    value = trial.intermediate_values.get(last) if last is not None else None
    shown = progress.get(trial.number) if trial.state.name == "RUNNING" else None
    step = f"{shown['step']:.0f}/{shown['of']:.0f}" if shown else str(_last_step(attributes))
    return [
        str(trial.number),
        *[console.short(swept.get(k, "-")) for k in study.meta.swept],
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
        print(f"no worker runs; start one with: python -m lorasweep resume {console.shown(study.folder)}")
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
    loaded = preflight.preflight([spec], not launchers.is_elsewhere(study.meta.launcher))
    metric = spec.task_type.primary or loaded[workload.key(spec)].task.primary
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
        print(f"{study.meta.name} stops; go on with: python -m lorasweep resume {console.shown(study.folder)}")
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
    folder = study.trial_folder(trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder, replace(result_of(trial, folder), state="PRUNED", reason=reason))
    (folder / checkpoint.CHECKPOINT).unlink(missing_ok=True)


def repair(words: Sequence[str]) -> int:
    """Send MLflow what it missed: points, runs, and the winner as a model where the study has ended.

    tracking.uri names another store, which is given everything. Returns 1 where MLflow did not take all of it.
    """
    study, rest = find(words)
    wrong = [w for w in rest if not w.startswith("tracking.uri=")]
    if wrong:
        raise ConfigError([f"sync: takes a study and tracking.uri=..., got '{wrong[0]}'"])
    spec = study.spec([*study.space.fixed, *rest])
    counts = runs.sync(study.folder, spec)
    print(counts)
    over = not study.running() and (not study.waiting() or study.spent())
    told = model_registry.log_winner(study, spec) if over and not counts.failed else ""
    if told:
        print(told)
    return 1 if counts.failed or told.startswith(model_registry.NOT_LOGGED) else 0

"""The commands that look at a running study and steer it, without a model: status, stop."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorasweep import console
from lorasweep.cli.find import PLACE, find, refuse_more
from lorasweep.cli.parser import Options
from lorasweep.config.overrides import key_of
from lorasweep.credentials import redact
from lorasweep.errors import ConfigError
from lorasweep.files import CHECKPOINT
from lorasweep.search.order import ENDED
from lorasweep.study import prospects
from lorasweep.study.result import result_of, write_result
from lorasweep.study.study import Study

# --- status ----------------------------------------------------------------------------------------------------------


def status(options: Options) -> int:
    """Print a study's trials, again and again with --watch."""
    study, request = find(options.study, options.words)
    refuse_more(request, "status takes a study and --watch")
    while True:
        if options.watch:
            print("\x1b[2J\x1b[H", end="")
        _show(study)
        if not options.watch or not (study.queue.waiting() + study.queue.running()):
            return 0
        time.sleep(2)


def _show(study: Study) -> None:
    meta, trials = study.meta, study.trials()
    progress: dict[int, Any] = {}
    for worker in study.signals.workers().values():
        progress |= {int(number): reached for number, reached in worker["trials"].items()}
    columns = ["trial", *meta.swept, "state", "step", meta.metric, "seconds", "note"]
    console.table(f"study {meta.name}", columns, [_row(study, t, progress) for t in trials])
    states = [t.state.name.lower() for t in trials]
    counts = {s: states.count(s) for s in ("complete", "pruned", "fail", "running", "waiting")}
    print("  ".join(f"{n} {s}" for s, n in counts.items() if n))
    for line in study.left_out():
        print(line)
    for line in _outlook(study, trials):
        print(line)
    if study.queue.waiting() and study.not_begun():
        print(f"no more trials begin: {study.not_begun()}")
    elif (study.queue.waiting() or study.queue.running()) and not study.owners.alive():
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


def _outlook(study: Study, trials: Sequence[Any]) -> Iterator[str]:
    """Yield the best so far, how likely the trials that are left change it, and when they will have ended."""
    best = study.best()
    if best is not None:
        yield f"best so far: trial {best.number}, {study.meta.metric} {best.values[0]:.4f}"
    found = prospects.change(study, trials)
    if found is not None:
        yield (
            f"chance that one of the {found.more} trials that are left is better by more than {found.margin:.2g}: "
            f"{found.chance:.0%}, if they are like those so far"
        )
    left = prospects.time_left(study, time.time())
    if left is not None:
        yield f"about {_duration(left)} left" + (", before any repeats" if study.search.repeats else "")


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(5, 5 * round(seconds / 5))} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 100 else f"{minutes // 60} hours {minutes % 60} minutes"


# --- stop ----------------------------------------------------------------------------------------------------


def stop(options: Options) -> int:
    """End one trial as PRUNED, or with --all stop the study as one Ctrl-C does."""
    study, _ = find(options.study, [word for word in options.words if key_of(word) in PLACE and "=" in word])
    words = [word for word in options.words if not (key_of(word) in PLACE and "=" in word)]
    if options.all:
        study.signals.stop(None, "stop --all")
        print(f"{study.meta.name} stops; go on with: python -m lorasweep resume {console.shown(study.folder)}")
        return 0
    if not words or not words[0].isdigit():
        raise ConfigError([f"give a trial's number (stop takes --all too), got {words[0] if words else 'none'}"])
    number, why = int(words[0]), " ".join(words[1:]) or "asked for"
    trial = study.trial(number)
    if trial.state in ENDED:
        raise ConfigError([f"{number}: this trial has ended, {trial.state.name}"])
    reason = redact(f"stopped by hand: {why}")
    if study.queue.end_waiting(number, reason):
        _leave_result(study, trial, reason)
    else:
        study.signals.stop(number, reason)
    print(f"trial {number} ends as PRUNED")
    return 0


def _leave_result(study: Study, trial: Any, reason: str) -> None:
    """Write the result of a trial that ended while it waited; `sync` then ends its MLflow run, if it has one."""
    folder = study.trial_folder(trial.number)
    folder.mkdir(parents=True, exist_ok=True)
    write_result(folder, replace(result_of(trial, folder), state="PRUNED", reason=reason))
    (folder / CHECKPOINT).unlink(missing_ok=True)

"""A study's trials as a table, the best one, and how to run it again."""

import shlex
from collections.abc import Mapping
from typing import Any

from lorasweep import console
from lorasweep.config.measures import COSTS
from lorasweep.config.spec import TrackSpec
from lorasweep.credentials import redact
from lorasweep.study import answer, repeats, wording
from lorasweep.study.answer import Answer
from lorasweep.study.baselines import NAMES
from lorasweep.study.candidate import Candidate
from lorasweep.study.result import RESULT, TrialResult, read_result
from lorasweep.study.study import Study


def show(study: Study, outputs: str, found: Answer, track: TrackSpec) -> None:
    """Print the table, the answer with its rerun lines, and where to compare in MLflow."""
    meta = study.meta
    again = {t.number: t.user_attrs for t in study.trials() if not repeats.is_searched(t)}
    columns = ["trial", *meta.swept, f"eval {meta.metric}", "trainable", "seconds", "adapter MB", "state"]
    results = [read_result(study.trial_folder(trial.number)) for trial in study.trials()]
    rows = [_row(r, meta.swept, again.get(r.number)) for r in results if r is not None]
    console.table(f"study {meta.name}", columns, rows)
    print()
    for line in wording.sentences(found):
        print(line)
    if found.best is not None:
        _show_best(study, found.best, track)
        if len(found.candidates) > 1:
            _show_others(study, found, found.best)
        if found.best.result.overrides:
            path = console.shown(study.folder / answer.BEST)
            print(f"the best as a file: {path} (python -m lorasweep --sweep {shlex.quote(str(path))})")
    if track.enabled:
        print(f"compare in MLflow: {_ui(outputs, track)}")


def _ui(outputs: str, track: TrackSpec) -> str:
    """Return the address of a server, or the command that opens the UI on a store."""
    uri = redact(track.uri or "")
    if uri.startswith("http"):
        return uri
    where = [] if outputs == "./outputs" else [f"outputs={outputs}"]
    where += [f"tracking.uri={uri}"] if uri else []
    return shlex.join(["python", "-m", "lorasweep", "ui", *where])


def _show_best(study: Study, best: Candidate, track: TrackSpec) -> None:
    """Print how to run the best again, and where its adapter is."""
    folder = study.trial_folder(best.number)
    if not best.result.rerun:  # it ran on a machine without our disk
        return
    print(f"\nrun it again: {_again(study, best)}")
    kept = track.save_adapters != "none"
    print(f"its adapter:  {console.shown(folder / 'adapter') if kept else 'not kept (tracking.save_adapters=none)'}")


def _show_others(study: Study, found: Answer, best: Candidate) -> None:
    """Print how to run the cheapest one near enough, and those on the Pareto front."""
    cheap = found.cheapest
    if cheap is not None and cheap.number != best.number:
        print(f"run the cheapest again: {_again(study, cheap)}")
    print("Pareto front: no other trial beats these in quality and cost at once:")
    for c in found.front:
        against = ", ".join(m.title for cost, m in COSTS.items() if c.number in found.fronts[cost])
        print(f"  trial {c.number}, {_in_short(c, found.metric)} (by {against})")
        if c.result.rerun and c not in (best, cheap):
            print(f"    {_again(study, c)}")


def _again(study: Study, candidate: Candidate) -> str:
    return console.command(candidate.result.rerun, study.trial_folder(candidate.number) / RESULT)


def _in_short(c: Candidate, metric: str) -> str:
    return ", ".join([f"eval {metric} {c.value:.4f}", *(COSTS[k].phrase.format(v) for k, v in c.result.costs.items())])


def _row(result: TrialResult, swept: list[str], beside: Mapping[str, Any] | None) -> list[str]:
    notes = []
    if beside:
        notes = [NAMES[beside["baseline"]] if "baseline" in beside else f"repeat of trial {beside['repeat_of']}"]
    notes += [result.reason] if result.reason else []
    return [
        str(result.number),
        *[console.short(result.params_swept.get(k)) for k in swept],
        f"{result.metric.value:.4f}" if result.metric else "-",
        "-" if result.trainable is None else f"{result.trainable:,}",
        "-" if result.train_s is None else f"{result.device_s:.1f}",
        "-" if result.adapter_mb is None else f"{result.adapter_mb:.2f}",
        result.state + (f" ({'; '.join(notes)})" if notes else ""),
    ]

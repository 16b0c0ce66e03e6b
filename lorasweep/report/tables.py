"""A study in words and tables: what report.md holds, and the text of report.html."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lorasweep.report.cost import Cost, cost
from lorasweep.report.search_figures import COSTS, figures
from lorasweep.report.study_data import Evidence, Shown, counted, duration, short

STATES = {
    "COMPLETE": "finished",
    "PRUNED": "pruned",
    "FAIL": "failed",
    "RUNNING": "running",
    "WAITING": "waiting",
}
"""Optuna's states in plain words, in the order of the leader table."""
MOST_ROWS = 20
"""Rows of a table in report.md; report.html has all."""


@dataclass(frozen=True, kw_only=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    empty: str = "Nothing."
    """What stands there without rows."""


def progress(evidence: Evidence) -> str:
    """Return how many trials there are in each state, and the best one's test score."""
    counts = [(len(evidence.of(state)), word) for state, word in STATES.items()]
    told = ", ".join(f"{n} {word}" for n, word in counts if n)
    tested = evidence.test.get(evidence.metric)
    score = (
        f" Test {evidence.metric} of the best: {tested:.4f}, read once, after choosing." if tested is not None else ""
    )
    trivial = f" {evidence.no_better}" if evidence.no_better else ""
    return f"{counted(len(evidence.trials), 'trial')}: {told or 'none'}.{score}{trivial}"


def reading(evidence: Evidence) -> str:
    """Return how to read the leaders' intervals and comparisons."""
    against = f" Against the best: {evidence.method}." if evidence.method else ""
    again = any(t.repeat_of is not None for t in evidence.trials)
    seeds = " A configuration that ran again is judged by its new seeds alone; its costs are its first run's."
    return f"Intervals are over eval examples, or over seeds where that is wider.{against}{seeds if again else ''}"


def leaders(evidence: Evidence) -> Table:
    """Return every trial, the best first; then those without a metric."""
    keys = list(dict.fromkeys([a.key for a in evidence.axes] + [k for t in evidence.trials for k in t.point]))
    head = ["trial", "state", f"eval {evidence.metric}", "95 % interval", "against the best", *keys]
    head += ["trainable parameters", "device s", "adapter MB", "reason"]
    ranked = [t for state in STATES for t in _in_order(evidence, state)]
    rows = [
        [
            str(t.number),
            STATES[t.state] + (f", repeat of {t.repeat_of}" if t.repeat_of is not None else ""),
            _reached(t),
            t.interval or "-",
            t.standing or "-",
            *(short(t.point[k]) if k in t.point else "-" for k in keys),
            _count(t.trainable),
            _number(t.device_s, 1),
            _number(t.adapter_mb, 2),
            t.reason or "-",
        ]
        for t in ranked
    ]
    return Table(head=head, rows=rows, empty="No trial yet.")


def _reached(trial: Shown) -> str:
    """Return a trial's metric; of one that runs, the last so far and its step."""
    if trial.state == "RUNNING" and trial.curve:
        step, value = trial.curve[-1]
        return f"{value:.4f} at step {step}"
    return _number(trial.value, 4)


def _in_order(evidence: Evidence, state: str) -> list[Shown]:
    ranked = evidence.ranked(state)
    return [*ranked, *(t for t in evidence.of(state) if t not in ranked)]


def costs(evidence: Evidence) -> Table:
    """Return what the study has used and what it was spared."""
    found = cost(evidence)
    rows = [
        [
            "device time of ended trials (training and evaluation)",
            f"{duration(found.device_s)} ({found.device_s / 3600:.3g} device hours)",
        ],
        ["time in which trials ran", duration(found.elapsed_s) if found.elapsed_s else "not known"],
        ["optimiser steps taken", f"{found.steps:,}"],
        ["steps spared by pruning", _spared(found)],
        ["device time spared by pruning", _saved(found, found.pruning_s)],
        ["device time spared by shared passes (packing)", _saved(found, found.packing_s)],
        ["device time spared by kept frozen layers (prefix reuse)", _saved(found, found.prefix_s)],
        ["trials at a time, on average", _side_by_side(found)],
    ]
    ended = [t.worker_peak_gib for t in evidence.trials if t.worker_peak_gib]
    rows.append(["highest memory of a worker", f"{max(ended):.2f} GiB" if ended else "not known"])
    return Table(head=["what", "how much"], rows=rows)


def _spared(found: Cost) -> str:
    if found.spared is None:
        return "not known: the finished trials have different lengths, or none has finished"
    return f"{found.steps_spared:,} ({found.spared:.0%} of all planned steps)"


def _saved(found: Cost, seconds: float | None) -> str:
    share = found.share(seconds)
    if seconds is None or share is None:
        return "not measured"
    return f"{duration(seconds)} ({share:.0%} of what it would have taken)"


def _side_by_side(found: Cost) -> str:
    if found.side_by_side is None:
        return "not known"
    shared = " (in shared passes, or in several workers)" if found.side_by_side > 1.05 else ""
    return f"{found.side_by_side:.1f}{shared}"


def failures(evidence: Evidence) -> Table:
    """Return the failed trials with their reasons."""
    rows = [[str(t.number), t.reason or "not known", t.rerun or "-"] for t in evidence.of("FAIL")]
    return Table(head=["trial", "reason", "run it again"], rows=rows, empty="No trial failed.")


def origins(evidence: Evidence) -> Table:
    """Return what the results were made from: data, seeds, versions."""
    seeds = sorted({t.seed for t in evidence.trials if t.seed is not None})
    rows = [
        ["data fingerprint", ", ".join(evidence.fingerprints) or "not known"],
        ["seeds", ", ".join(map(str, seeds)) or "not known"],
        *([k, v] for k, v in evidence.facts.items()),
        *([k.replace("_", " "), f"{v:.4f} on the evaluation split"] for k, v in evidence.baseline.items()),
        ["report made", evidence.made],
    ]
    return Table(head=["what", "value"], rows=rows)


def commands(evidence: Evidence) -> list[tuple[str, str]]:
    """Return what to type next, each with what it does."""
    found = []
    if evidence.best is not None and evidence.best.rerun:
        found.append(("Run the best trial again", evidence.best.rerun))
    if evidence.best_file:
        found.append(("The same from a file", shlex.join(["python", "-m", "lorasweep", "--sweep", evidence.best_file])))
    found += _runners_up(evidence)
    found.append(("Run the whole study again", evidence.command))
    found.append(("Make this report again", shlex.join(["python", "-m", "lorasweep", "report", evidence.folder])))
    return found


def _runners_up(evidence: Evidence) -> list[tuple[str, str]]:
    """Return how to run the cheapest trial near the best again, and those on the Pareto front, the best one aside."""
    costs: dict[int, list[str]] = {}
    for cost_of, numbers in evidence.fronts.items():
        for number in numbers:
            costs.setdefault(number, []).append(COSTS[cost_of][0])
    found = []
    for trial in evidence.ranked("COMPLETE"):
        what = ["the cheapest within one standard error"] if trial.number == evidence.cheapest else []
        what += [f"on the Pareto front of {' and '.join(costs[trial.number])}"] if trial.number in costs else []
        if what and trial.rerun and trial.number != evidence.chosen:
            found.append((f"Run trial {trial.number} again, {', '.join(what)}", trial.rerun))
    return found[:MOST_ROWS]


# --- report.md -------------------------------------------------------------------------------------------------------


def markdown(evidence: Evidence) -> str:
    """Return the report as Markdown: the same answer and tables, each figure as its sentence."""
    return "\n".join(_markdown(evidence)) + "\n"


def _markdown(evidence: Evidence) -> Iterator[str]:
    yield f"# {plain(evidence.name)}\n"
    if evidence.question:
        yield f"**Question**: {plain(evidence.question)}\n"
    yield f"**Answer**: {plain(evidence.said)}\n"
    yield f"{progress(evidence)}\n"
    yield from _section("Leaders", leaders(evidence))
    yield f"{plain(reading(evidence))}\n"
    yield "## What the figures show\n"
    yield from (f"- **{plain(f.title)}**: {plain(f.says)}" for f in figures(evidence))
    yield ""
    yield from _section("Cost", costs(evidence))
    yield from _section("Failures", failures(evidence))
    yield from _section("Made from", origins(evidence))
    yield "## Next\n"
    for what, line in commands(evidence):
        yield f"{what}:\n\n    {' '.join(line.split())}\n"


def _section(title: str, table: Table) -> Iterator[str]:
    yield f"## {title}\n"
    if not table.rows:
        yield f"{table.empty}\n"
        return
    yield f"| {' | '.join(map(plain, table.head))} |"
    yield "|" + "---|" * len(table.head)
    yield from (f"| {' | '.join(map(plain, row))} |" for row in table.rows[:MOST_ROWS])
    left = len(table.rows) - MOST_ROWS
    yield f"\n{left} more in report.html\n" if left > 0 else ""


def plain(text: str) -> str:
    """Return text from data so that Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*|\[\]<>])", r"\\\1", " ".join(text.split())).replace("\\<", "&lt;")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"

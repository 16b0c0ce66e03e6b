"""A study in words and tables: what report.md holds, and the text of report.html."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from lorasweep.config.measures import COSTS
from lorasweep.report.cost import Cost, cost
from lorasweep.report.search_figures import figures
from lorasweep.report.study_data import StudyData, TrialData, duration, short
from lorasweep.study import wording
from lorasweep.study.baselines import NAMES
from lorasweep.study.wording import counted

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


def progress(data: StudyData) -> str:
    """Return how many trials there are in each state."""
    counts = [(len(data.of(state)), word) for state, word in STATES.items()]
    told = ", ".join(f"{n} {word}" for n, word in counts if n)
    return f"{counted(len(data.trials), 'trial')}: {told or 'none'}."


def reading(data: StudyData) -> str:
    """Return how to read the leaders' intervals and comparisons."""
    again = any(t.repeat_of is not None for t in data.trials)
    seeds = (
        " Of a configuration that ran again the mean of the new seeds is shown; all its runs choose. Its costs are its "
        "first run's."
    )
    return f"Intervals are over eval examples, and over seeds where several ran.{seeds if again else ''}"


def leaders(data: StudyData) -> Table:
    """Return every trial, the best first; then those without a metric."""
    points = [t.point for t in data.trials if not t.baseline]
    keys = list(dict.fromkeys(chain([a.key for a in data.axes], *points)))
    head = ["trial", "state", f"eval {data.meta.metric}", "95 % interval", "against the best", *keys]
    by_rule = any("train.learning_rate=auto" in t.result.overrides for t in data.trials)
    head += ["highest learning rate"] if by_rule else []
    head += ["trainable parameters", "device s", "adapter MB", "reason"]
    ranked = chain.from_iterable(_in_order(data, state) for state in STATES)
    rows = [_leader(data, trial, keys, by_rule) for trial in ranked]
    return Table(head=head, rows=rows, empty="No trial yet.")


def _leader(data: StudyData, trial: TrialData, keys: Sequence[str], by_rule: bool) -> list[str]:
    rate = trial.result.learning_rate
    return [
        str(trial.number),
        STATES[trial.state]
        + (f", repeat of {trial.repeat_of}" if trial.repeat_of is not None else "")
        + (f", {NAMES[trial.baseline]}" if trial.baseline else ""),
        _reached(trial),
        trial.interval or "-",
        data.standing(trial) or "-",
        *(short(trial.point[k]) if k in trial.point else "-" for k in keys),
        *([f"{rate:.2g}" if rate is not None else "-"] if by_rule else []),
        _count(trial.result.trainable),
        _number(trial.result.device_s, 1),
        _number(trial.result.adapter_mb, 2),
        trial.result.reason or "-",
    ]


def _reached(trial: TrialData) -> str:
    """Return a trial's metric; of one that runs, the last so far and its step."""
    if trial.state == "RUNNING" and trial.curve:
        step, value = trial.curve[-1]
        return f"{value:.4f} at step {step}"
    return _number(trial.value, 4)


def _in_order(data: StudyData, state: str) -> list[TrialData]:
    ranked = data.ranked(state)
    return [*ranked, *(t for t in data.of(state) if t not in ranked)]


def costs(data: StudyData) -> Table:
    """Return what the study has used and what it was spared."""
    found = cost(data)
    rows = [
        [
            "device time of ended trials (training and evaluation)",
            f"{duration(found.device_s)} ({found.device_s / 3600:.3g} device hours)",
        ],
        ["time in which trials ran", duration(found.elapsed_s) if found.elapsed_s else "not known"],
        *_expected(data, found),
        ["optimiser steps taken", f"{found.steps:,}"],
        ["steps spared by pruning", _spared(found)],
        ["device time spared by pruning", _saved(found, found.pruning_s)],
        ["device time spared by shared passes (packing)", _saved(found, found.packing_s)],
        ["device time spared by kept frozen layers (prefix reuse)", _saved(found, found.prefix_s)],
        ["trials at a time, on average", _side_by_side(found)],
    ]
    ended = [t.result.worker_peak_gib for t in data.trials if t.result.worker_peak_gib]
    rows.append(["highest memory of a worker", f"{max(ended):.2f} GiB" if ended else "not known"])
    return Table(head=["what", "how much"], rows=rows)


def _expected(data: StudyData, found: Cost) -> Iterator[list[str]]:
    """Yield what the trials were expected to take, and what their time has cost."""
    before = data.meta.expected_s
    if before is not None:
        yield ["time that was expected before they began", duration(before)]
    price = data.meta.search.get("cost_per_hour")
    if price and found.elapsed_s:
        workers = data.meta.search.get("workers") or 1
        yield [
            f"price of that time (search.cost_per_hour={price:g})",
            f"{found.elapsed_s / 3600 * price * workers:.2f}",
        ]


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


def failures(data: StudyData) -> Table:
    """Return the failed trials with their reasons."""
    rows = [[str(t.number), t.result.reason or "not known", t.result.rerun or "-"] for t in data.of("FAIL")]
    return Table(head=["trial", "reason", "run it again"], rows=rows, empty="No trial failed.")


def origins(data: StudyData) -> Table:
    """Return what the results were made from: data, seeds, versions."""
    seeds = sorted({t.seed for t in data.trials if t.seed is not None})
    rows = [
        ["data fingerprint", ", ".join(data.fingerprints) or "not known"],
        ["seeds", ", ".join(map(str, seeds)) or "not known"],
        *([k, v] for k, v in data.facts.items()),
        *([k.replace("_", " "), f"{v:.4f} on the evaluation split"] for k, v in data.answer.baseline.items()),
        ["report made", data.made],
    ]
    return Table(head=["what", "value"], rows=rows)


def commands(data: StudyData) -> list[tuple[str, str]]:
    """Return what to type next, each with what it does."""
    found = []
    if data.best is not None and data.best.result.rerun:
        found.append(("Run the best trial again", data.best.result.rerun))
    if data.best_file:
        found.append(("The same from a file", shlex.join(["python", "-m", "lorasweep", "--sweep", data.best_file])))
    found += _runners_up(data)
    found.append(("Run the whole study again", shlex.join(["python", "-m", "lorasweep", "-m", *data.meta.overrides])))
    found.append(("Make this report again", shlex.join(["python", "-m", "lorasweep", "report", data.folder])))
    return found


def _runners_up(data: StudyData) -> list[tuple[str, str]]:
    """Return how to run the cheapest trial near the best again, and those on the Pareto front, the best one aside."""
    costs: dict[int, list[str]] = {}
    for cost_of, numbers in data.answer.fronts.items():
        for number in numbers:
            costs.setdefault(number, []).append(COSTS[cost_of].title)
    found = []
    cheapest = data.answer.cheapest
    for trial in data.ranked("COMPLETE"):
        what = ["the cheapest within the margin"] if cheapest and trial.number == cheapest.number else []
        what += [f"on the Pareto front of {' and '.join(costs[trial.number])}"] if trial.number in costs else []
        if what and trial.result.rerun and trial is not data.best:
            found.append((f"Run trial {trial.number} again, {', '.join(what)}", trial.result.rerun))
    return found[:MOST_ROWS]


# --- report.md -------------------------------------------------------------------------------------------------------


def markdown(data: StudyData) -> str:
    """Return the report as Markdown: the same answer and tables, each figure as its sentence."""
    return "\n".join(_markdown(data)) + "\n"


def _markdown(data: StudyData) -> Iterator[str]:
    yield f"# {plain(data.meta.name)}\n"
    if data.meta.question:
        yield f"**Question**: {plain(data.meta.question)}\n"
    yield f"**Answer**: {plain(wording.text(data.answer))}\n"
    yield f"{progress(data)}\n"
    yield from _section("Leaders", leaders(data))
    yield f"{plain(reading(data))}\n"
    yield "## What the figures show\n"
    yield from (f"- **{plain(f.title)}**: {plain(f.says)}" for f in figures(data))
    yield ""
    yield from _section("Cost", costs(data))
    yield from _section("Failures", failures(data))
    yield from _section("Made from", origins(data))
    yield "## Next\n"
    for what, line in commands(data):
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
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = re.sub(r"([\\`*|\[\]~$]|(?<![^\W_])_|_(?![^\W_])|^[#+-](?= )|(?<=^\d)[.)](?= ))", r"\\\1", line)
    return re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;").replace(">", "&gt;")


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"

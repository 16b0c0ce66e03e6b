"""The figures of a report: how the search went, what matters, what quality costs."""

import math
from collections.abc import Sequence

from lorasweep.config.measures import COSTS
from lorasweep.report.figure import Figure, Json, layout, log_ticks, metric_axis, points, safe
from lorasweep.report.parameter_figures import effects, heat_map, parallel
from lorasweep.report.study_data import StudyData, TrialData, duration
from lorasweep.study.direction import better
from lorasweep.study.wording import counted

MOST_CURVE_POINTS = 20_000
"""Points of all learning curves together; more are thinned, the last of each curve stays."""


def figures(data: StudyData) -> list[Figure]:
    """Return the report's figures in the order of reading."""
    return [
        history(data),
        importance(data),
        *effects(data),
        heat_map(data),
        parallel(data),
        curves(data),
        *(pareto(data, cost) for cost in COSTS),
    ]


def history(data: StudyData) -> Figure:
    """Return the metric of each trial in its order, with the best so far."""
    done, ended = (sorted(data.ranked(s), key=lambda t: t.number) for s in ("COMPLETE", "PRUNED"))
    title = "How the search went"
    if not done:
        return Figure(id="history", title=title, says="No trial has finished yet.")
    line: list[tuple[int, float]] = []
    for t in done:
        if t.value is not None and (not line or better(t.value, line[-1][1], data.meta.maximize)):
            line.append((t.number, t.value))
    steps = [*line, (max(t.number for t in data.trials), line[-1][1])]
    says = (
        f"Each point is a trial; the line is the best {data.meta.metric} so far. "
        f"It improved {counted(len(line) - 1, 'time')} and stands at {line[-1][1]:.4f} since trial {line[-1][0]}."
    )
    traces = [
        points("pruned", ended, [t.number for t in ended], {"color": "@grey", "symbol": "x", "size": 7}),
        points("finished", done, [t.number for t in done], {"color": "@blue", "size": 8}),
        {
            "type": "scatter",
            "mode": "lines",
            "name": "best so far",
            "x": [n for n, _ in steps],
            "y": [v for _, v in steps],
            "line": {"shape": "hv", "color": "@orange", "width": 2},
            "hoverinfo": "skip",
        },
    ]
    return Figure(
        id="history",
        title=title,
        says=says,
        traces=[t for t in traces if t["x"]],
        layout=layout({"title": "trial number", "tickformat": "d"}, metric_axis(data), len(traces) > 1),
    )


def importance(data: StudyData) -> Figure:
    """Return each parameter's share of the variance of the metric."""
    title, found = "Which parameter matters", data.importance
    if not found:
        return Figure(id="importance", title=title, says=data.importance_says)
    says = data.importance_says
    keys = list(found)[::-1]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [found[k] for k in keys],
        "y": [safe(k) for k in keys],
        "text": [f"{found[k]:.0%}" for k in keys],
        "textposition": "auto",
        "marker": {"color": "@blue"},
        "hoverinfo": "skip",
    }
    x = {"title": "share of the variance (%)", "tickformat": ".0%", "rangemode": "tozero"}
    drawn_on = layout(x, {"type": "category"}, False) | {"height": 120 + 36 * len(keys)}
    rows = [[k, f"{v:.1%}"] for k, v in found.items()]
    return Figure(
        id="importance", title=title, says=says, traces=[bars], layout=drawn_on, table=(["parameter", "share"], rows)
    )


def curves(data: StudyData) -> Figure:
    """Return the metric over the steps: pruned trials grey, the best one on top."""
    title, drawn = "Learning curves", [t for t in data.trials if t.curve]
    if not drawn:
        return Figure(id="curves", title=title, says="No trial has been evaluated yet.")
    most = max(2, MOST_CURVE_POINTS // len(drawn))
    best = data.best
    pruned = [t for t in drawn if t.state in ("PRUNED", "FAIL")]
    others = [t for t in drawn if t not in pruned and t is not best]
    traces = [
        _curves("finished or running", others, most, "@blue", 1.2) | {"opacity": 0.4 if len(others) > 20 else 0.9},
        _curves("pruned or failed", pruned, most, "@grey", 1),
        _curves(f"best: trial {best.number}", [best], most, "@orange", 3) if best and best.curve else None,
        _kept(drawn),
    ]
    says = (
        f"The {data.meta.metric} on the evaluation split at each evaluation of {len(drawn)} trials; "
        f"{len(pruned)} ended early and {'is' if len(pruned) == 1 else 'are'} grey."
    )
    if traces[-1]:
        says += " Circles mark the evaluations that trials keep: their scores and their adapters are of these steps."
    drawn_on = layout({"title": "optimiser steps", "rangemode": "tozero"}, metric_axis(data), True)
    drawn_on["hovermode"] = "closest"
    return Figure(id="curves", title=title, says=says, traces=[t for t in traces if t and t["x"]], layout=drawn_on)


def _curves(name: str, trials: Sequence[TrialData], most: int, color: str, width: float) -> Json:
    """Return many curves as one trace with gaps: hundreds of traces would take seconds to draw."""
    xs: list[int | None] = []
    ys: list[float | None] = []
    numbers: list[int] = []
    for t in trials:
        every = math.ceil(len(t.curve) / most)
        kept = [p for i, p in enumerate(t.curve) if i % every == 0 or i == len(t.curve) - 1]
        xs += [*(s for s, _ in kept), None]
        ys += [*(float(f"{v:.5g}") for _, v in kept), None]
        numbers += [t.number] * (len(kept) + 1)
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(trials) == 1 and len(xs) < 100 else "lines",
        "name": name,
        "x": xs,
        "y": ys,
        "customdata": numbers,
        "line": {"color": color, "width": width},
        "hovertemplate": "trial %{customdata}, step %{x}: %{y:.4f}<extra></extra>",
    }


def _kept(trials: Sequence[TrialData]) -> Json | None:
    """Return a circle at the evaluation that each trial keeps; nothing where that is the last one of all."""
    values = {t.number: dict(t.curve).get(t.result.kept_step or -1) for t in trials}
    marked = [t for t in trials if values[t.number] is not None]
    if all(t.result.kept_step == t.curve[-1][0] for t in marked):
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "kept",
        "x": [t.result.kept_step for t in marked],
        "y": [float(f"{values[t.number]:.5g}") for t in marked],
        "customdata": [t.number for t in marked],
        "marker": {"color": "@orange", "symbol": "circle-open", "size": 9},
        "hovertemplate": "trial %{customdata} keeps step %{x}: %{y:.4f}<extra></extra>",
    }


def pareto(data: StudyData, cost: str) -> Figure:
    """Return quality against a cost, with the trials that nothing cheaper beats."""
    measure = COSTS[cost]
    done = [t for t in data.ranked("COMPLETE") if cost in t.result.costs]
    name = f"Quality against {measure.title}"
    if len(done) < 2:
        return Figure(id=f"pareto-{cost}", title=name, says="It takes two finished trials.")
    known = {t.number: t for t in done}
    found = [known[n] for n in data.answer.fronts.get(cost, ()) if n in known]
    listed = "; ".join(f"trial {t.number}: {t.value:.4f} for {_amount(t.result.costs[cost], cost)}" for t in found[:6])
    says = (
        f"No trial is both better and cheaper than one on the line ({len(found)} of {len(done)} finished trials). "
        f"{listed}."
    )
    if cost == "peak_gib":
        says += " It is what a trial needs by itself, estimated: tensors, without Python and its libraries."
    costs = [t.result.costs[cost] for t in done]
    wide = min(costs) > 0 and max(costs) / min(costs) > 8
    traces = [
        points("finished", done, costs, {"color": "@blue", "size": 8, "opacity": 0.7}),
        {
            **points("on the front", found, [t.result.costs[cost] for t in found], {"color": "@orange", "size": 11}),
            "mode": "lines+markers",
            "line": {"color": "@orange", "shape": "hv", "width": 2},
        },
    ]
    x = {"title": f"{measure.title} ({measure.unit})"} | (
        log_ticks(min(costs), max(costs)) if wide else {"rangemode": "tozero"}
    )
    return Figure(id=f"pareto-{cost}", title=name, says=says, traces=traces, layout=layout(x, metric_axis(data), True))


def _amount(value: float, cost: str) -> str:
    """Return a cost in a sentence."""
    if cost.endswith("_s"):
        return duration(value)
    return f"{value:,.0f} parameters" if COSTS[cost].unit == "count" else f"{value:.2f} {COSTS[cost].unit}"

"""Figures of the parameters: the effect of each, two together, all at once."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from lorasweep.report.figure import Figure, Json, layout, log_ticks, metric_axis, points, safe
from lorasweep.report.study_data import Axis, Group, StudyData, TrialData, groups, place, short
from lorasweep.study.wording import counted

MOST_BINS = 8
CHOSEN = (
    "The search chose which trials are there, so the means have no intervals: a sampler that learns draws where it is "
    "good, a pruner leaves the good ones."
)
MOST_EFFECTS = 12
BANDS = 5
"""Colours of the parallel coordinates, from the worst fifth of the trials to the best."""
CLOSEST = 0.09
"""Least share of an axis between two ticks."""
MANY = 20
"""Trials of one colour from which their lines are thin and let others shine through."""
SCALE = [[0.0, "#00224e"], [0.25, "#434e6c"], [0.5, "#7d7c78"], [0.75, "#bcaf6f"], [1.0, "#fee838"]]
"""Cividis: it reads the same with and without red and green."""


def effects(data: StudyData) -> list[Figure]:
    """Return for each parameter the mean of the metric by its value, with the mean's 95 % interval."""
    done = data.ranked("COMPLETE")
    axes = [a for a in data.by_importance() if len(a.values) > 1][:MOST_EFFECTS]
    return [_effect(data, done, a, i) for i, a in enumerate(axes)]


def _effect(data: StudyData, done: Sequence[TrialData], axis: Axis, i: int) -> Figure:
    found = groups(done, axis, MOST_BINS, sure=data.is_designed)
    title = f"Effect of {axis.key}"
    if not found:
        return Figure(id=f"effect-{i}", title=title, says="No trial that sets it has finished yet.")
    best = (max if data.meta.maximize else min)(found, key=lambda g: g.mean)
    unsure = "" if best.half is None else f" ± {best.half:.4f}"
    if len(found) > 1 and all(g.mean == best.mean for g in found):
        says = f"Mean {data.meta.metric} is the same at each of {len(found)} values, {best.mean:.4f}."
    else:
        says = (
            f"Mean {data.meta.metric} is best at {axis.key} = {best.label}: {best.mean:.4f}{unsure} over "
            f"{counted(best.count, 'trial')}."
        )
    says += f" {_bars(found, axis) if data.is_designed else CHOSEN}"
    if sum(len(a.values) > 1 for a in data.axes) > 1:
        says += " Other parameters vary too."
    own = [t for t in done if axis.key in t.point]
    places = [t.point[axis.key] if axis.numeric else safe(short(t.point[axis.key])) for t in own]
    traces = [
        *(_band(found) if axis.numeric else []),
        points("trials", own, places, {"color": "@grey", "size": 6, "opacity": 0.6}),
        _means(found, axis),
    ]
    drawn_on = layout(_parameter_axis(axis), metric_axis(data) | {"range": _range(own)}, True)
    rows = [[g.label, str(g.count), f"{g.mean:.4f}", "-" if g.half is None else f"± {g.half:.4f}"] for g in found]
    head = [axis.key, "trials", f"mean {data.meta.metric}", "95 % interval"]
    return Figure(
        id=f"effect-{i}",
        title=title,
        says=says,
        traces=traces,
        layout=drawn_on,
        table=(head, rows),
    )


def _bars(found: Sequence[Group], axis: Axis) -> str:
    """Return how to read the intervals, or why there are none."""
    known = sum(g.half is not None for g in found)
    if not known:
        return "With one trial a value nothing tells how sure that is."
    band = axis.numeric and known > 1
    return f"The {'band and the bars' if band else 'bars'} hold the mean with 95 % confidence."


def _range(trials: Sequence[TrialData]) -> list[float]:
    """Return the ends of the metric's axis: the trials and some room; an interval of two trials may be far wider."""
    values = [t.value for t in trials if t.value is not None]
    low, high = min(values), max(values)
    room = 0.2 * (high - low) or 0.05 * abs(high) or 1.0
    return [low - room, high + room]


def _band(found: Sequence[Group]) -> list[Json]:
    """Return the area between the ends of the intervals, where at least two values have one."""
    known = [(g.centre, g.mean, g.half) for g in found if g.half is not None]
    if len(known) < 2:
        return []
    upper = [(x, mean + half) for x, mean, half in known]
    lower = [(x, mean - half) for x, mean, half in reversed(known)]
    ring = [*upper, *lower, upper[0]]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "95 % interval",
            "x": [x for x, _ in ring],
            "y": [y for _, y in ring],
            "fill": "toself",
            "fillcolor": "@band",
            "line": {"width": 0, "color": "@band"},
            "hoverinfo": "skip",
        }
    ]


def _means(found: Sequence[Group], axis: Axis) -> Json:
    return {
        "type": "scatter",
        "mode": "lines+markers" if axis.numeric else "markers",
        "name": "mean",
        "x": [g.centre if axis.numeric else safe(g.label) for g in found],
        "y": [g.mean for g in found],
        "error_y": {"type": "data", "array": [g.half or 0 for g in found], "color": "@blue", "thickness": 1.5},
        "marker": {"color": "@blue", "size": 9},
        "line": {"color": "@blue", "width": 2},
        "text": [f"{safe(axis.key)} {safe(g.label)}<br>mean {g.mean:.4f} of {g.count}" for g in found],
        "hoverinfo": "text",
    }


def chosen_pair(data: StudyData) -> tuple[Axis, Axis] | None:
    """Return the two parameters of the heat map: rank by learning rate where both vary, else the two most important."""
    vary = [a for a in data.by_importance() if len(a.values) > 1]
    known = {a.key: a for a in vary}
    if "lora.r" in known and "train.learning_rate" in known:
        return known["train.learning_rate"], known["lora.r"]
    return (vary[0], vary[1]) if len(vary) > 1 else None


def heat_map(data: StudyData) -> Figure:
    """Return the mean metric of finished trials over two parameters."""
    pair, done = chosen_pair(data), data.ranked("COMPLETE")
    if pair is None or not done:
        why = "No trial has finished yet." if not done else "It takes two parameters that vary."
        return Figure(id="heat", title="Two parameters together", says=why)
    across, up = pair
    cells: dict[tuple[int, int], list[float]] = {}
    for t in done:
        if across.key in t.point and up.key in t.point and t.value is not None:
            at = (place(up, t.point[up.key], MOST_BINS), place(across, t.point[across.key], MOST_BINS))
            cells.setdefault(at, []).append(t.value)
    xs, ys = _ticks(across), _ticks(up)
    means = {at: sum(v) / len(v) for at, v in cells.items()}
    title = f"{up.key} by {across.key}"
    if not means:
        return Figure(id="heat", title=title, says="No finished trial sets both.")
    best = (max if data.meta.maximize else min)(means, key=lambda at: means[at])
    says = (
        f"Mean {data.meta.metric} for each pair of values; the best cell is {up.key} = {ys[best[0]]} with "
        f"{across.key} = {xs[best[1]]}, {means[best]:.4f} over {counted(len(cells[best]), 'trial')}. "
        "Nothing finished in empty cells."
    )
    z: list[list[float | None]] = [[None] * len(xs) for _ in ys]
    texts = [[""] * len(xs) for _ in ys]
    for (row, column), mean in means.items():
        z[row][column] = mean
        texts[row][column] = f"{mean:.3f}"
    heat = {
        "type": "heatmap",
        "x": [safe(x) for x in xs],
        "y": [safe(y) for y in ys],
        "z": z,
        "text": texts,
        "texttemplate": "%{text}",
        "colorscale": SCALE,
        "reversescale": not data.meta.maximize,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"title": {"text": safe(f"{data.meta.metric} ({data.unit})"), "side": "right"}, "thickness": 12},
        "hovertemplate": "%{y}, %{x}<br>mean %{z:.4f}<extra></extra>",
    }
    x = {"title": safe(_titled(across)), "type": "category"}
    y = {"title": safe(_titled(up)), "type": "category"}
    rows = [[ys[j], xs[i], f"{means[j, i]:.4f}", str(len(cells[j, i]))] for j, i in sorted(means)]
    return Figure(
        id="heat",
        title=title,
        says=says,
        traces=[heat],
        layout=layout(x, y, False),
        table=([up.key, across.key, f"mean {data.meta.metric}", "trials"], rows),
        wide=90 + 64 * len(xs) if len(xs) > 4 else 0,
    )


def _ticks(axis: Axis) -> list[str]:
    """Return the label of each of the axis's bins."""
    if not axis.numeric or len(axis.values) <= MOST_BINS:
        return [short(v) for v in axis.values]
    low, high = (math.log(v) if axis.log else v for v in (axis.values[0], axis.values[-1]))
    edges = [low + (high - low) * i / MOST_BINS for i in range(MOST_BINS + 1)]
    shown = [short(float(math.exp(e) if axis.log else e)) for e in edges]
    return [f"{a} to {b}" for a, b in itertools.pairwise(shown)]


def parallel(data: StudyData) -> Figure:
    """Return one line a trial across all parameters, coloured by the metric; drawn as plain lines."""
    done = data.ranked("COMPLETE", "PRUNED")
    axes = [a for a in data.axes if len(a.values) > 1]
    title = "All parameters of all trials"
    if len(axes) < 2 or len(done) < 2:
        return Figure(id="parallel", title=title, says="It takes two parameters that vary and two trials.")
    values = [t.value or 0.0 for t in done]
    low, high = min(values), max(values)
    traces = []
    for band in reversed(range(BANDS)):  # the best are drawn last, on top
        members = done[len(done) * band // BANDS : len(done) * (band + 1) // BANDS]
        if members:
            traces.append(_lines(members, axes, (low, high), BANDS - 1 - band))
    count = len(axes)
    says = (
        f"Each line is one of {len(done)} trials and crosses each of {count} axes at its value; the last axis is its "
        f"{data.meta.metric}. Yellow is the best fifth, blue the worst."
    )
    names = [safe(a.key).replace(".", ".<br>", 1) for a in axes] + [safe(data.meta.metric)]
    notes = list(itertools.chain.from_iterable(_axis_notes(axis, place) for place, axis in enumerate(axes)))
    notes += [_note(count, 0.0, f"{low:.4g}"), _note(count, 1.0, f"{high:.4g}")]
    drawn_on = layout(
        {"tickvals": list(range(count + 1)), "ticktext": names, "range": [-0.3, count + 0.45], "side": "top"},
        {"visible": False, "range": [-0.06, 1.06]},
        True,
    )
    drawn_on["annotations"] = notes
    drawn_on["margin"] = {"t": 60, "l": 8, "r": 8, "b": 8}
    drawn_on["legend"] = {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0}
    drawn_on["xaxis"] |= {"gridcolor": "@text", "zeroline": False}
    return Figure(id="parallel", title=title, says=says, traces=traces, layout=drawn_on, wide=110 * (count + 1))


def _lines(members: Sequence[TrialData], axes: Sequence[Axis], ends: tuple[float, float], band: int) -> Json:
    xs: list[float | None] = []
    ys: list[float | None] = []
    texts: list[str] = []
    low, high = ends
    for t in members:
        heights = [_height(a, t.point[a.key]) if a.key in t.point else None for a in axes]
        heights.append(((t.value or 0.0) - low) / (high - low) if high > low else 0.5)
        xs += [*range(len(heights)), None]
        ys += [None if h is None else round(h, 4) for h in heights] + [None]
        texts += [str(t.number)] * (len(heights) + 1)
    names = ("worst fifth", "", "middle", "", "best fifth")
    return {
        "type": "scatter",
        "mode": "lines",
        "name": names[band] or f"{'second' if band == 1 else 'fourth'} fifth",
        "x": xs,
        "y": ys,
        "text": texts,
        "hovertemplate": "trial %{text}<extra></extra>",
        "connectgaps": False,
        "opacity": 0.35 if len(members) > MANY else 0.8,
        "line": {"color": f"@rank{band}", "width": 1 if len(members) > MANY else 2.5 if band == BANDS - 1 else 1.5},
    }


def _height(axis: Axis, value: Any) -> float:
    """Return where a value lies on an axis from 0 to 1."""
    if not axis.numeric:
        return [str(v) for v in axis.values].index(str(value)) / (len(axis.values) - 1)
    low, high, at = (math.log(v) if axis.log else v for v in (axis.values[0], axis.values[-1], value))
    return (at - low) / (high - low)


def _axis_notes(axis: Axis, i: int) -> list[Json]:
    few = len(axis.values) <= MOST_BINS
    marks = axis.values if few else [axis.values[0], axis.values[len(axis.values) // 2], axis.values[-1]]
    return [_note(i, _height(axis, v), short(v)) for v in marks]


def _note(x: float, y: float, text: str) -> Json:
    own = {
        "showarrow": False,
        "xanchor": "left",
        "xshift": 4,
        "bgcolor": "@veil",
        "font": {"color": "@text", "size": 12},
    }
    return {"x": x, "y": y, "text": safe(text)} | own


def _titled(axis: Axis) -> str:
    units = {"lora.r": "rank", "train.learning_rate": "per step", "train.batch_size": "examples"}
    unit = units.get(axis.key) or ("number" if axis.numeric else "choice")
    return f"{axis.key} ({unit}{', log scale' if axis.log else ''})"


def _parameter_axis(axis: Axis) -> Json:
    """Return a parameter's axis; where few values lie on a logarithmic one, each has its own tick."""
    if not axis.numeric:
        names = [safe(short(v)) for v in axis.values]
        return {"title": safe(_titled(axis)), "type": "category", "categoryorder": "array", "categoryarray": names}
    own: Json = {"type": "log" if axis.log else "linear"}
    if len(axis.values) <= MOST_BINS:
        marks = _apart(axis)
        own |= {"tickvals": marks, "ticktext": [short(v) for v in marks]}
    elif axis.log:
        own |= log_ticks(axis.values[0], axis.values[-1])
    return {"title": safe(_titled(axis)), **own}


def _apart(axis: Axis) -> list[Any]:
    """Return the values whose ticks stay apart on a phone: the ends, and those between that are far enough off."""
    if len(axis.values) < 3:
        return list(axis.values)
    out = [axis.values[0]]
    for value in axis.values[1:-1]:
        if min(_height(axis, value) - _height(axis, out[-1]), 1 - _height(axis, value)) >= CLOSEST:
            out.append(value)
    return [*out, axis.values[-1]]

"""A figure of the report, as plotly.js takes it: plain data, so that no plotting library is imported to make one.

A colour `@name` is a CSS variable of the page, for light and dark; all of them are Okabe and Ito's. Text from data is
escaped, as plotly reads a little HTML in it.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from lorasweep.report.study_data import StudyData, TrialData

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure, or the reason why there is none."""

    id: str
    title: str
    says: str
    """A sentence that says what it shows: the text beside it, and what a screen reader reads."""
    traces: Sequence[Json] = ()
    layout: Json | None = None
    table: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    """Head and rows of the same numbers as text."""
    wide: int = 0
    """Least width in pixels; a narrower screen scrolls it."""


def safe(text: str) -> str:
    """Return text from data as plotly shows it letter by letter."""
    return html.escape(text, quote=False)


def points(name: str, trials: Sequence[TrialData], x: Iterable[Any], marker: Mapping[str, Any]) -> Json:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": [t.value for t in trials],
        "text": [f"{safe(t.label()).replace(', ', '<br>').replace(': ', '<br>', 1)}<br>{t.value:.4f}" for t in trials],
        "hoverinfo": "text",
        "marker": dict(marker),
    }


def log_ticks(low: float, high: float) -> Json:
    """Return a logarithmic axis with ticks at 1, 2 and 5 of each decade, at 1 and 3, or at 1, as its length asks."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 4 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{power}") for power, step in product(powers, steps)]
    values = [v for v in ticks if low / 1.1 <= v <= high * 1.1]
    return {"type": "log", "tickvals": values, "ticktext": [_rounded(v) for v in values]}


def _rounded(value: float) -> str:
    """Return 200k for 200000."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def metric_axis(data: StudyData) -> Json:
    return {"title": safe(f"eval {data.meta.metric} ({data.unit})")}


def layout(x: Json, y: Json, legend: bool) -> Json:
    """Return the layout that all figures share."""
    axes = [
        {**axis, **({"title": {"text": axis["title"]}} if "title" in axis else {})} | {"automargin": True}
        for axis in (x, y)
    ]
    shared = {"gridcolor": "@grid", "linecolor": "@grid", "zerolinecolor": "@grid"}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@text", "family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"bgcolor": "@panel", "bordercolor": "@grid", "font": {"color": "@text"}},
        "margin": {"t": 12, "r": 12, "b": 8, "l": 8},
        "height": 400,
        "showlegend": legend,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "dragmode": False,
        "xaxis": axes[0] | shared,
        "yaxis": axes[1] | shared,
    }

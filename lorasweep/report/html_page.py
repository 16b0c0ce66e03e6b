"""The report as files in the study's folder: report.html, one page that needs no network, and report.md."""

import base64
import gzip
import html
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lorasweep.credentials import redact
from lorasweep.files import replace_file
from lorasweep.report import tables
from lorasweep.report.figure import Figure
from lorasweep.report.search_figures import figures
from lorasweep.report.study_data import StudyData, gather
from lorasweep.report.tables import Table
from lorasweep.study import answer, wording
from lorasweep.study.answer import Answer
from lorasweep.study.study import Study
from lorasweep.tracking.runs import REPORTS

HERE = Path(__file__).parent
LONG = 32
"""Characters from which a table's cell may break into lines."""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""What the page may load: nothing that is not in it."""

PARTS = {
    "history": "The search",
    "importance": "Parameters",
    "curves": "Training",
    "pareto-trainable": "Quality and cost",
}
"""Figures that open a section of the page, with its heading."""


def write(study: Study, said: Answer | None = None) -> tuple[Path, Path]:
    """Write both files as the study stands at this moment; return their paths."""
    said = said or answer.answer(study)
    # The page names best.yaml, and a study that goes on may have another best by now.
    answer.write_best(study, said, wording.text(said))
    data = gather(study, said)
    drawn = figures(data)
    paths = study.folder / REPORTS[0], study.folder / REPORTS[1]
    replace_file(paths[0], redact(page(data, drawn)).replace("<!-- plotly -->", plotly(), 1))
    replace_file(paths[1], redact(tables.markdown(data)))
    return paths


def write_if_possible(study: Study, said: Answer) -> None:
    """Write both files at a study's end; say why where that fails: the study has its result all the same."""
    try:
        write(study, said)
    except (OSError, ArithmeticError, LookupError, ValueError) as error:
        print(f"no report was made ({type(error).__name__}: {error}); the trials are kept")


@cache
def plotly() -> str:
    """Return plotly.js, gzip in base64: 2 MB in place of 4.8."""
    found = importlib.util.find_spec("plotly")
    assert found is not None and found.submodule_search_locations, "plotly is one of the package's requirements"
    source = Path(found.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return base64.b64encode(gzip.compress(source.read_bytes(), mtime=0)).decode()


def page(data: StudyData, drawn: Sequence[Figure]) -> str:
    """Return the page, with a comment where plotly.js goes."""
    title = escape(data.meta.name)
    question = f'<p class="question">{escape(data.meta.question)}</p>' if data.meta.question else ""
    best = str(data.best.number) if data.best else None
    links = {
        "leaders": "Leaders",
        **PARTS,
        "cost": "Cost",
        "failures": "Failures",
        "origins": "Made from",
        "next": "Next",
    }
    listed = "".join(f'<li><a href="#{place}">{name}</a></li>' for place, name in links.items())
    body = "".join(_part(f) for f in drawn)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: report</title>
<style>{_file("page.css")}</style></head><body>
<a class="skip" href="#leaders">Skip to the results</a>
<header><h1>{title}</h1>{question}
<p class="answer">{escape(wording.text(data.answer))}</p>
<p class="soft">{escape(tables.progress(data))} Made {escape(data.made)}.</p></header>
<nav aria-label="Sections"><ul>{listed}</ul></nav>
<main>
<noscript><p>The charts need JavaScript; each one's sentence and the tables do not.</p></noscript>
<h2 id="leaders">Leaders</h2>{_table(tables.leaders(data), "All trials, the best first", best)}
<p class="soft">{escape(tables.reading(data))}</p>
{body}
<h2 id="cost">Cost</h2>{_table(tables.costs(data), "What the study used and what it was spared")}
<h2 id="failures">Failures</h2>{_table(tables.failures(data), "Failed trials and why")}
<h2 id="origins">Made from</h2>{_table(tables.origins(data), "Data, seeds and versions")}
<h2 id="next">Next</h2>{_commands(data)}
</main>
<script type="application/json" id="figures">{_json(drawn)}</script>
<script type="application/gzip" id="plotly"><!-- plotly --></script>
<script>{_file("page.js")}</script>
</body></html>
"""


def _part(figure: Figure) -> str:
    """Return a figure, under its section's heading where it opens one."""
    heading = f'<h2 id="{figure.id}">{PARTS[figure.id]}</h2>' if figure.id in PARTS else ""
    return heading + _figure(figure)


def _figure(figure: Figure) -> str:
    """Return a figure's title, sentence, chart and numbers; one without traces says why."""
    said = f"<h3>{escape(figure.title)}</h3><p>{escape(figure.says)}</p>"
    if not figure.traces or figure.layout is None:
        return said
    wide = f' style="min-width:{figure.wide}px"' if figure.wide else ""
    label = escape(f"{figure.title}. {figure.says}")
    chart = f'<div class="chart" id="chart-{figure.id}" role="img" aria-label="{label}"{wide}></div>'
    numbers = ""
    if figure.table:
        head, rows = figure.table
        table = _table(Table(head=head, rows=rows), figure.title)
        numbers = f"<details><summary>{escape(figure.title)}: the numbers</summary>{table}</details>"
    box = f'<div class="scroll" tabindex="0" role="group" aria-label="chart">{chart}</div>'
    return f"<figure>{said}{box}{numbers}</figure>"


def _table(table: Table, caption: str, best: str | None = None) -> str:
    """Return a table in a scrolling box; the buttons in its head sort it."""
    if not table.rows:
        return f"<p>{escape(table.empty)}</p>"
    head = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in table.head)
    rows = ""
    for row in table.rows:
        rows += f"<tr{' class=best' if row[0] == best else ''}>{''.join(map(_cell, row))}</tr>"
    shown = f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="group" aria-label="{escape(caption)}">{shown}</div>'


def _cell(text: str) -> str:
    kind = ' class="text"' if len(text) > LONG else ""
    return f"<td{kind}>{escape(text)}</td>"


def _commands(data: StudyData) -> str:
    return "".join(f"<p>{escape(what)}:</p><pre>{escape(line)}</pre>" for what, line in tables.commands(data))


def _json(drawn: Sequence[Figure]) -> str:
    """Return the figures' data as JSON that cannot end the script element it stands in."""
    data = [{"id": f.id, "traces": f.traces, "layout": f.layout} for f in drawn if f.traces]
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf8")


def escape(text: str) -> str:
    """Return text from data as HTML shows it letter by letter."""
    return html.escape(text, quote=True)

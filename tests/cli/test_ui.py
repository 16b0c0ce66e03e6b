"""The MLflow UI in a real browser: a study and its trials are found, compared and read as a person would.

With LORASWEEP_SCREENSHOTS=FOLDER it leaves the pictures of the README there:

    LORASWEEP_SCREENSHOTS=docs python -m pytest -m slow tests/cli/test_ui.py
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import CHROMIUM, close_panel, expand, open_runs, served, tab

from lorasweep.study.result import TrialResult, read_result
from lorasweep.tracking import outbox

pytest.importorskip("playwright.sync_api", reason="the extra dev has playwright")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium"),
]

QUESTION = "Which rank is enough?"
SMALL = ["train.max_steps=20", "train.eval_every=5", "data.max_train_samples=200", "data.max_eval_samples=100"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ui")
    words = ["-m", "lora.r=2,4,8", *SMALL, "study=ranks", f"search.question='{QUESTION}'"]
    for line in (words, ["report", "outputs/ranks"]):
        done = subprocess.run([sys.executable, "-m", "lorasweep", *line], cwd=folder, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder / "outputs"


@pytest.fixture(scope="module")
def address(outputs) -> Iterator[str]:
    """Yield where `python -m lorasweep ui` serves."""
    with served(outputs) as found:
        yield found


@pytest.fixture(scope="module")
def page(address) -> Iterator[Any]:
    with tab(viewport={"width": 1280, "height": 720}) as page:
        page.set_default_timeout(15_000)
        open_runs(page, address)
        close_panel(page)
        yield page


def results(outputs: Path) -> dict[str, TrialResult]:
    """Return the result.json of each trial, by the name of its run."""
    folders = [outputs / "ranks" / str(i) for i in range(3)]
    return {json.loads((f / outbox.NAME).read_text())["name"]: read_result(f) for f in folders}


def picture(page: Any, name: str) -> None:
    folder = os.environ.get("LORASWEEP_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)  # charts and menus come to rest
        page.screenshot(path=Path(folder) / f"{name}.png")


def param(page: Any, key: str) -> list[str]:
    """Return what a row of the comparison's table holds, a cell a run."""
    row = page.locator("tr").filter(has=page.get_by_role("rowheader", name=key, exact=True))
    return [cell.strip() for cell in row.locator("td").all_inner_texts()]


METRIC = """key => {
    const all = [...document.querySelectorAll("a[title='Plot chart']")];
    const top = all.find(a => a.innerText.trim() === key).parentElement.style.top;
    const row = [...document.querySelectorAll("div")].filter(d => d.style.top === top && !d.querySelector("a"));
    return row.sort((a, b) => parseInt(a.style.left) - parseInt(b.style.left)).map(d => d.innerText.trim());
}"""
"""Cells of the table of metrics, which is drawn of boxes at fixed places."""


def test_study_opens_to_its_trials_and_three_compared_say_what_their_results_say(page, outputs):
    wanted = results(outputs)
    rows = page.locator(".ag-pinned-left-cols-container .ag-row")
    rows.get_by_text("ranks", exact=True).wait_for()
    expand(page)
    for name in wanted:
        rows.get_by_text(name, exact=True).wait_for()
        rows.filter(has_text=name).locator(".ag-checkbox-input").check()
    page.get_by_test_id("runs-compare-button").click()
    page.get_by_text("Comparing 3 Runs").wait_for()
    page.get_by_title("Plot chart").first.wait_for()
    chosen = page.locator("[class*=select-selection-item-content]")
    chosen.filter(has_text=outbox.OBJECTIVE).first.wait_for()  # parallel coordinates begin with what varies and this
    chosen.filter(has_text="lora.r").first.wait_for()
    picture(page, "compare")
    names, ranks = param(page, "Run Name:"), param(page, "lora.r")
    objectives = page.evaluate(METRIC, outbox.OBJECTIVE)
    assert sorted(names) == sorted(wanted)
    for name, rank, objective in zip(names, ranks, objectives, strict=True):
        assert int(rank) == wanted[name].params_swept["lora.r"]
        assert float(objective) == pytest.approx(wanted[name].metric.value, abs=1e-3)


SCATTER = """() => {
    const plot = [...document.querySelectorAll(".js-plotly-plot")].find(p => p.offsetWidth);
    const titles = [...plot.querySelectorAll(".xtitle, .ytitle")].map(e => e.textContent);
    return [titles, plot.data[0].x.map(Number), plot.data[0].y];
}"""


def test_scatter_view_shows_metric_over_rank(page, outputs):
    page.get_by_role("tab", name="Scatter Plot").click()
    for axis, key in (("x", "lora.r"), ("y", outbox.OBJECTIVE)):
        page.locator(f"#{axis}-axis-selector").click()
        page.get_by_role("option", name=key, exact=True).first.click()
    page.locator(".ytitle", has_text=outbox.OBJECTIVE).wait_for()
    titles, ranks, objectives = page.evaluate(SCATTER)
    assert titles == ["lora.r", outbox.OBJECTIVE]
    wanted = {r.params_swept["lora.r"]: r.metric.value for r in results(outputs).values()}
    assert dict(zip(ranks, objectives, strict=True)) == pytest.approx(wanted)
    picture(page, "scatter")


TABLE = """keys => {
    const rows = [...document.querySelectorAll(".ag-center-cols-container .ag-row")];
    rows.sort((a, b) => a.getAttribute("row-index") - b.getAttribute("row-index"));
    return rows.map(row => keys.map(key => row.querySelector(`[col-id*='${key}']`).innerText));
}"""
"""What columns of the table of runs hold, from its first row down."""


def test_experiments_note_leads_to_the_trials_best_first(page, address, outputs):
    open_runs(page, address)
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="its trials, best first").click()
    view = opened.value
    wanted = sorted((r.metric.value, r.params_swept["lora.r"]) for r in results(outputs).values())
    view.locator("[col-id*='lora.r'].ag-cell").nth(len(wanted) - 1).wait_for()
    shown = [(float(value), int(rank)) for value, rank in view.evaluate(TABLE, ["objective", "lora.r"])]
    assert shown == [(pytest.approx(value), rank) for value, rank in reversed(wanted)]
    picture(view, "trials")
    view.close()


def test_study_shows_question_and_answer_and_leads_to_its_best_trial(page, address, outputs):
    study = outbox.load(outputs / "ranks")
    assert study is not None
    page.goto(f"{address}/#/experiments/1/runs/{study.run_id}")
    page.get_by_text(QUESTION).first.wait_for()
    link = page.get_by_role("link", name=re.compile(r"^trial \d$")).first
    number = link.inner_text().removeprefix("trial ")
    best = outbox.load(outputs / "ranks" / number)
    assert best is not None
    assert link.get_attribute("href") == f"#/runs/{best.run_id}"
    page.goto(f"{address}/{link.get_attribute('href')}")
    page.get_by_role("heading", name=best.name).wait_for()


def test_report_opens_under_the_studys_artifacts(page, address, outputs):
    study = outbox.load(outputs / "ranks")
    assert study is not None
    page.goto(f"{address}/#/experiments/1/runs/{study.run_id}/artifacts/report.html")
    report = page.frame_locator("iframe")
    report.get_by_text(QUESTION).first.wait_for()

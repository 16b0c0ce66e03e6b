"""report.html and report.md: what stands in them, that nothing breaks out of them, and that a browser draws them."""

import base64
import gzip
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from support import browser
from support.browser import CHROMIUM
from support.studies import SMALL

from lorasweep.cli import main
from lorasweep.report import html_page
from lorasweep.report.search_figures import figures
from lorasweep.report.study_data import Axis, gather
from lorasweep.search import samplers, space
from lorasweep.study.answer import Answer
from lorasweep.study.meta import Entry, StudyMeta
from lorasweep.study.result import Params, TrialResult, write_result
from lorasweep.study.study import Study

EVIL = "<script>alert(1)</script>"
OVERRIDES = ["lora.r=4,8", "train.learning_rate=tag(log,interval(1e-5,1e-3))", f"data.path={EVIL}"]


def result_of(number: int, state: str, steps: int) -> TrialResult:
    """Return what a trial came to that was not trained; a failed one has a reason that looks like markup."""
    ours = {"number": number, "state": state, "overrides": [], "params_swept": {}}
    rerun = f"python -m lorasweep lora.r={number}"
    if state == "FAIL":
        return TrialResult(**ours, reason=f"RuntimeError: {EVIL} | out of luck", rerun=rerun)
    return TrialResult(
        **ours,
        reason="",
        rerun=rerun,
        data_fingerprint="f00d",
        baseline={"majority": 0.3},
        params=Params(trainable=9000 + number),
        steps=steps,
        train_s=2.0,
        eval_s=1.0,
    )


def made(folder: Path, trials: int = 12, name: str = "s", question: str = "Which rank?") -> Study:
    """Return a study whose trials have ended: every fourth is pruned, the last has failed."""
    found, problems = space.read(OVERRIDES[:2])
    assert not problems
    meta = StudyMeta(
        name=name,
        swept=found.keys,
        overrides=OVERRIDES,
        metric="accuracy",
        maximize=True,
        created="2026-01-01T00:00:00+0000",
        question=question,
        space=found.describe(),
        outputs=str(folder),
    )
    study = Study.create(folder / "s", meta, [])
    known = samplers.distributions(found)
    frozen, results = [], []
    for i in range(trials):
        state = TrialState.PRUNED if i % 4 == 3 else TrialState.COMPLETE
        state = TrialState.FAIL if i == trials - 1 else state
        value = 0.5 + 0.01 * i
        point = {"lora.r": (4, 8)[i % 2], "train.learning_rate": 1e-5 * 1.3**i}
        result = result_of(i, state.name, 10 if state == TrialState.PRUNED else 20)
        results.append(result)
        frozen.append(
            optuna.create_trial(
                state=state,
                value=None if state == TrialState.FAIL else value,
                params=point,
                distributions=known,
                intermediate_values={5: value / 2, 10: value},
                user_attrs=result.stored(),
            )
        )
    for number, result in zip(study.queue.take_in(frozen, None), results, strict=True):
        place = study.trial_folder(number)
        place.mkdir()
        write_result(place, result)
        (place / "run.json").write_text(json.dumps({"seed": 7, "versions": {"torch": "9.9"}}))
    return study


class Reader(HTMLParser):
    """Collects the elements of a page, and its text outside scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> tuple[str, Reader]:
    text, reader = path.read_text(encoding="utf8"), Reader()
    reader.feed(text)
    return text, reader


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, Path]:
    return html_page.write(made(tmp_path_factory.mktemp("outputs"), name=EVIL, question=f"Why {EVIL}?"))


def test_page_answers_the_question(written):
    text = " ".join(read(written[0])[1].text)
    assert f"Why {EVIL}?" in text
    assert "Trial 10 (lora.r=4" in text
    for words in ("Leaders", "Effect of lora.r", "Learning curves", "Cost", "f00d", "torch", "9.9", "majority"):
        assert words in text
    assert "12 trials: 9 finished, 2 pruned, 1 failed" in text
    assert "20 (9% of all planned steps)" in text  # 9 x 20 and 2 x 10 taken, 2 x 10 spared


def test_nothing_from_data_becomes_markup(written):
    code = "    "  # Markdown shows lines so indented as they are
    told = [line for line in written[1].read_text(encoding="utf8").splitlines() if not line.startswith(code)]
    assert EVIL not in written[0].read_text(encoding="utf8") + "".join(told)
    _, reader = read(written[0])
    assert [s.get("type") for s in reader.of("script")] == ["application/json", "application/gzip", None]


def test_swept_value_that_looks_like_markup_stays_text(tmp_path):
    """A label column named <script> is a choice of a categorical axis: in tables, tick labels, hover texts."""
    found = gather(made(tmp_path))
    trials = [
        replace(t, result=replace(t.result, params_swept={**t.point, "data.label_column": (EVIL, "b")[t.number % 2]}))
        for t in found.trials
    ]
    axis = Axis(key="data.label_column", numeric=False, log=False, values=[EVIL, "b"])
    evil = replace(found, trials=trials, axes=[*found.axes, axis])
    text = html_page.page(evil, figures(evil))
    assert EVIL not in text
    assert "&lt;script&gt;alert(1)" in text
    data = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S).group(1))
    shown = json.dumps([f for f in data if f["id"].startswith(("effect", "parallel"))])
    assert "&lt;script&gt;" in shown and EVIL not in shown  # plotly reads HTML in its texts


def test_figures_cannot_end_their_script(written):
    text, _ = read(written[0])
    data = re.search(r'id="figures">(.*?)</script>', text, re.S).group(1)
    assert "<" not in data
    assert {"history", "importance", "curves", "heat", "parallel"} <= {f["id"] for f in json.loads(data)}


def test_plotly_stands_in_the_page_once_and_nothing_is_loaded(written):
    text, reader = read(written[0])
    packed = re.search(r'id="plotly">(.*?)</script>', text, re.S).group(1)
    assert b"plotly.js v" in gzip.decompress(base64.b64decode(packed))[:400]
    assert text.count('id="plotly"') == 1
    assert not [a for _, a in reader.tags if a.get("src") or (a.get("href") or "#")[0] != "#"]
    assert "default-src 'none'" in text


def test_every_chart_has_an_alternative_text_and_every_link_a_place(written):
    text, reader = read(written[0])
    charts = [a for a in reader.of("div") if a.get("class") == "chart"]
    data = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.S).group(1))
    assert {c["id"] for c in charts} == {f"chart-{f['id']}" for f in data}
    assert all(c["role"] == "img" and c["aria-label"].count(".") >= 1 for c in charts)
    ids = {a.get("id") for _, a in reader.tags}
    assert {a["href"][1:] for a in reader.of("a")} <= ids
    assert all(a.get("tabindex") == "0" for a in reader.of("div") if a.get("class") == "scroll")
    assert reader.of("meta")[2]["content"] == "width=device-width, initial-scale=1"


def test_secrets_are_not_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted_token")
    study = made(tmp_path, question="hf_planted_token at https://me:pass@host/x")
    for path in html_page.write(study):
        text = path.read_text(encoding="utf8")
        assert "hf_planted" not in text
        assert "me:pass" not in text


def test_markdown_has_tables_that_data_cannot_break(written):
    text = written[1].read_text(encoding="utf8")
    rows = [line for line in text.splitlines() if line.startswith("| 11 |")]
    assert len(rows) == 2  # leaders and failures
    assert all(r"\| out of luck" in row for row in rows)
    assert "**Answer**: Trial 10" in text


def test_report_of_a_running_study_and_of_an_empty_one(tmp_path):
    study = made(tmp_path)
    study.queue.enqueue([Entry(["lora.r=4"], {"lora.r": 4}), Entry(["lora.r=8"], {"lora.r": 8})])
    assert study.claim() == 12
    text = " ".join(read(html_page.write(study)[0])[1].text)
    assert "1 running, 1 waiting" in text
    assert "So far" in text
    assert "trial 10" in (study.folder / "best.yaml").read_text(encoding="utf8").lower()
    empty = Study.create(tmp_path / "e", replace(study.meta, name="e"), [])
    text = " ".join(read(html_page.write(empty)[0])[1].text)
    assert "No trial is complete yet" in text


def test_report_that_cannot_be_written_leaves_the_study_finished(tmp_path, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(html_page, "replace_file", full)
    html_page.write_if_possible(made(tmp_path), Answer(metric="accuracy", maximize=True, going_on=False))
    assert "no report was made (OSError" in capsys.readouterr().out


@pytest.fixture(scope="module")
def swept(tiny_bert, tmp_path_factory) -> Path:
    """Return the folder of a study that has been run, with MLflow."""
    outputs = tmp_path_factory.mktemp("outputs")
    model = [f"model.pretrained={tiny_bert}", "tracking.reload_check=false"]
    assert main.main(["-m", "lora.r=2,4", *model, *SMALL, f"outputs={outputs}", "study=s"]) == 0
    return outputs / "s"


def artifacts(folder: Path) -> dict[str, int]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder.parent}/mlflow.db")
    parent = json.loads((folder / "study.json").read_text())["mlflow_parent"]
    return {a.path: a.file_size for a in client.list_artifacts(parent)}


def test_finished_study_has_its_report_in_its_folder_and_in_mlflow(swept):
    sizes = {name: (swept / name).stat().st_size for name in ("report.html", "report.md")}
    assert sizes["report.html"] < 2_200_000
    assert sizes.items() <= artifacts(swept).items()


def test_report_command_writes_and_logs_again(swept, capsys):
    (swept / "report.html").unlink()
    with (swept / "report.md").open("a") as file:
        file.write("x" * 10_000)
    assert main.main(["report", str(swept)]) == 0
    assert capsys.readouterr().out.split() == [str(swept / "report.html"), str(swept / "report.md")]
    assert artifacts(swept)["report.md"] == (swept / "report.md").stat().st_size


def test_report_takes_a_study_alone(swept, capsys):
    assert main.main(["report", str(swept), "lora.r=2"]) == 1
    assert "report takes a study alone" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "light"), (1200, "dark")])
def test_browser_draws_all_figures_without_an_error_and_without_the_network(written, width, scheme):
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with browser.tab(viewport={"width": width, "height": 900}, color_scheme=scheme) as tab:
        told: list[str] = []
        tab.on("console", lambda message: told.append(message.text))
        tab.on("pageerror", lambda error: told.append(str(error)))
        tab.on("dialog", lambda dialog: told.append(dialog.message))
        tab.on("request", lambda request: told.append(request.url) if not request.url.startswith("file:") else None)
        tab.goto(written[0].as_uri())
        tab.wait_for_selector("html[data-drawn]", state="attached", timeout=30_000)
        drawn = tab.locator(".chart .main-svg").count()
        charts = tab.locator(".chart").count()
        assert told == []
        assert drawn >= charts > 5
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        tab.locator("th button", has_text="eval accuracy").click()
        assert tab.locator("#leaders + div tbody tr td:nth-child(3)").first.inner_text() == "0.5000"
        colour = tab.evaluate("getComputedStyle(document.querySelector('.chart .xtick text')).fill")
        assert colour == {"light": "rgb(27, 31, 36)", "dark": "rgb(232, 234, 237)"}[scheme]


@pytest.mark.slow
def test_page_is_read_by_keyboard_alone(written):
    pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no chromium")
    with browser.tab(viewport={"width": 390, "height": 844}) as tab:
        tab.goto(written[0].as_uri())
        tab.wait_for_selector("html[data-drawn]", state="attached", timeout=30_000)
        tab.keyboard.press("Tab")
        skip = tab.evaluate("(() => { const a = document.activeElement; return [a.innerText, a.offsetLeft >= 0]; })()")
        assert skip == ["Skip to the results", True]
        tab.keyboard.press("Enter")
        assert tab.evaluate("location.hash") == "#leaders"
        tab.keyboard.press("Tab")  # the table's box, which the arrows scroll
        tab.keyboard.press("ArrowRight")
        tab.wait_for_timeout(500)
        assert tab.evaluate("document.activeElement.scrollLeft") > 0
        for _ in range(3):
            tab.keyboard.press("Tab")
        assert tab.evaluate("document.activeElement.innerText") == "eval accuracy"
        tab.keyboard.press("Enter")
        assert tab.locator("#leaders + div tbody tr td:nth-child(3)").first.inner_text() == "0.5000"
        assert tab.locator("th[aria-sort=ascending]").inner_text().startswith("eval accuracy")

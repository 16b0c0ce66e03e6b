"""The report's figures: what they show, that plotly takes them, and what stands there where there is nothing."""

import json
import re
from dataclasses import fields

import plotly.graph_objects as go
import pytest

from lorasweep.report import cost, parameter_figures, search_figures, study_data, tables
from lorasweep.report.figure import log_ticks
from lorasweep.report.study_data import Axis, StudyData, TrialData
from lorasweep.study.answer import Answer, Candidate
from lorasweep.study.meta import StudyMeta
from lorasweep.study.result import Params, TrialResult


def candidate(trial: TrialData) -> Candidate:
    assert trial.value is not None
    return Candidate(
        result=trial.result,
        values=(trial.value,),
        value=trial.value,
        searched=trial.value,
        repeated=False,
        standard_error=None,
        interval=None,
    )


def study(
    trials: list[TrialData],
    *,
    metric: str = "accuracy",
    maximize: bool = True,
    fronts: dict[str, list[int]] | None = None,
    cheapest: int | None = None,
    **named,
) -> StudyData:
    """Return a study of these trials over rank and learning rate; its best is that of the largest metric."""
    complete = [candidate(t) for t in trials if t.state == "COMPLETE"]
    said = Answer(
        metric=metric,
        maximize=maximize,
        going_on=False,
        candidates=complete,
        best=max(complete, key=lambda c: c.value, default=None),
        cheapest=next((c for c in complete if c.number == cheapest), None),
        fronts=fronts or {},
    )
    meta = StudyMeta(name="s", swept=[], overrides=[], metric=metric, maximize=maximize, created="")
    axes = [
        Axis(key=key, numeric=True, log=True, values=sorted({t.point[key] for t in trials if key in t.point}))
        for key in ("lora.r", "train.learning_rate")
    ]
    known = {"axes": axes, "importance": {"train.learning_rate": 0.8, "lora.r": 0.2}, "importance_says": "as it is"}
    return StudyData(**{"meta": meta, "answer": said, "trials": trials, **known, **named})


MEASURED = {f.name for f in fields(TrialResult)}


def trial(number: int, r: int = 4, rate: float = 1e-3, value: float | None = 0.5, **named) -> TrialData:
    """Return a trial; `named` are fields of its result, of TrialData, or `trainable`."""
    known = {"curve": [(1, 0.1), (2, value or 0.0)], "train_s": 1.0 + number, "adapter_mb": r / 10, "peak_gib": 1.5}
    known |= {"state": "COMPLETE", "trainable": 100 * r, "params_swept": {"lora.r": r, "train.learning_rate": rate}}
    known |= named
    trainable = known.pop("trainable")
    params = Params(trainable=trainable) if trainable is not None else None
    measured = {key: known.pop(key) for key in list(known) if key in MEASURED}
    result = TrialResult(number=number, reason="", overrides=[], params=params, **measured)
    return TrialData(result=result, value=value, **known)


MANY = [trial(i, r=2 ** (i % 4 + 1), rate=10 ** (-4 + i / 12), value=0.4 + 0.02 * i) for i in range(24)]
MANY[3] = trial(3, value=0.2, state="PRUNED")
MANY[5] = trial(5, value=None, state="FAIL", curve=())
MANY[7] = trial(7, value=None, state="RUNNING", trainable=None, train_s=None)


def traces(figure) -> dict[str, dict]:
    return {t.get("name", t["type"]): t for t in figure.traces}


@pytest.mark.parametrize("trials", [MANY, MANY[:1], MANY[3:4], MANY[5:6], MANY[:2]], ids=["many", "1", "p", "f", "2"])
def test_plotly_takes_every_figure_and_each_has_a_sentence(trials):
    for figure in search_figures.figures(study(trials, fronts={"trainable": [trials[0].number]})):
        assert figure.says
        assert figure.title
        text = json.dumps([figure.traces, figure.layout], allow_nan=False)
        if figure.traces:
            drawn, layout = json.loads(re.sub(r'"@\w+"', '"#123456"', text))
            go.Figure(data=drawn, layout=layout)  # raises for what plotly does not know


def test_axes_have_units():
    for figure in search_figures.figures(study(MANY, fronts={"trainable": [0], "train_s": [0]})):
        for name in ("xaxis", "yaxis"):
            title = (figure.layout or {}).get(name, {}).get("title", {}).get("text")
            assert (
                figure.id in ("parallel", "importance")
                or "(" in title
                or title
                in (
                    "trial number",
                    "optimiser steps",
                )
            ), (figure.id, name)


def test_history_draws_the_best_so_far():
    found = traces(search_figures.history(study([trial(0, value=0.5), trial(1, value=0.3), trial(2, value=0.7)])))
    assert (found["best so far"]["x"], found["best so far"]["y"]) == ([0, 2, 2], [0.5, 0.7, 0.7])


def test_history_of_a_metric_to_be_small_goes_down():
    figure = search_figures.history(study([trial(0, value=0.5), trial(1, value=0.3)], maximize=False))
    assert traces(figure)["best so far"]["y"] == [0.5, 0.3, 0.3]


def test_pruned_curves_are_grey_and_the_best_is_on_top():
    figure = search_figures.curves(study(MANY))
    found = traces(figure)
    assert found["pruned or failed"]["line"]["color"] == "@grey"
    assert set(found["pruned or failed"]["customdata"]) == {3}
    assert list(found)[-1] == "best: trial 23"


def test_long_curves_are_thinned_and_keep_their_end():
    curve = [(i, i / 1e5) for i in range(1, 50_001)]
    figure = search_figures.curves(study([trial(0, curve=curve), trial(1, value=0.9, curve=curve)]))
    for found in figure.traces:
        assert len(found["x"]) <= search_figures.MOST_CURVE_POINTS // 2 + 2
        assert found["x"][-2] == 50_000


def test_effect_is_the_mean_with_its_interval():
    values = [0.5, 0.6, 0.7]
    figure = parameter_figures.effects(
        study([trial(i, value=v) for i, v in enumerate(values)] + [trial(3, r=8, value=0.9)])
    )
    table = next(f.table for f in figure if f.title == "Effect of lora.r")
    assert table[1] == [["4", "3", "0.6000", "± 0.2484"], ["8", "1", "0.9000", "-"]]  # t(0.975, 2) * 0.1 / sqrt(3)


def test_equal_means_are_not_called_best():
    same = parameter_figures.effects(study([trial(0), trial(1), trial(2, r=8), trial(3, r=8)]))[0]
    assert same.says.startswith("Mean accuracy is the same at each of 2 values, 0.5000. The band and the bars hold")
    single = parameter_figures.effects(study([trial(0, value=0.6), trial(1, r=8)]))[0]
    assert "best at lora.r = 4: 0.6000 over 1 trial. With one trial a value nothing tells how sure" in single.says


def test_ticks_of_few_values_stay_apart():
    axis = Axis(key="train.learning_rate", numeric=True, log=True, values=[1e-3, 1.1e-3, 3e-3, 9.7e-3, 1e-2])
    assert parameter_figures._parameter_axis(axis)["tickvals"] == [1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (40714, 1271050, ["50k", "100k", "200k", "500k", "1M"]),
        (0.168, 2.73, ["0.2", "0.5", "1", "2"]),
        (1e-5, 2e-2, ["1e-05", "3e-05", "0.0001", "0.0003", "0.001", "0.003", "0.01"]),
        (1e3, 1e9, ["1k", "10k", "100k", "1M", "10M", "100M", "1G"]),
        (1, 8.1, ["1", "2", "5"]),
    ],
)
def test_logarithmic_axis_has_ticks_that_read_well(low, high, texts):
    axis = log_ticks(low, high)
    assert axis["ticktext"] == texts
    assert all(low / 1.1 <= v <= high * 1.1 for v in axis["tickvals"])


def test_trials_that_run_show_their_parameters_and_last_metric():
    running = trial(0, r=16, value=None, state="RUNNING", curve=[(5, 0.1), (10, 0.25)])
    found = tables.leaders(study([running], axes=[]))
    row = dict(zip(found.head, found.rows[0], strict=True))
    assert (row["eval accuracy"], row["lora.r"], row["train.learning_rate"]) == ("0.2500 at step 10", "16", "0.001")


def test_report_tells_how_to_run_the_cheapest_and_the_front_again():
    trials = [
        trial(0, value=0.5, rerun="run 0"),
        trial(1, value=0.6, rerun="run 1"),
        trial(2, value=0.7, rerun="run 2"),
    ]
    fronts = {"trainable": [0, 2], "train_s": [0, 1, 2]}
    known = study(trials, cheapest=1, best_file="outputs/s/best.yaml", fronts=fronts)
    found = dict(tables.commands(known))
    assert found["Run the best trial again"] == "run 2"
    assert found["The same from a file"] == "python -m lorasweep --sweep outputs/s/best.yaml"
    key = "Run trial 1 again, the cheapest within the margin, on the Pareto front of training time"
    assert found[key] == "run 1"
    assert found["Run trial 0 again, on the Pareto front of trainable parameters and training time"] == "run 0"


def test_many_values_are_binned_on_the_axis_scale():
    axis = Axis(key="train.learning_rate", numeric=True, log=True, values=[10 ** (-5 + i / 10) for i in range(40)])
    found = study_data.groups([trial(i, rate=v) for i, v in enumerate(axis.values)], axis)
    assert [g.count for g in found] == [5] * 8


def test_heat_map_takes_rank_by_learning_rate_before_more_important_ones():
    other = Axis(key="lora.lora_dropout", numeric=True, log=False, values=[0.0, 0.1])
    known = study(MANY)
    known = study(MANY, axes=[other, *known.axes], importance={"lora.lora_dropout": 0.9})
    assert [a.key for a in parameter_figures.chosen_pair(known)] == ["train.learning_rate", "lora.r"]


def test_heat_map_holds_the_mean_of_each_cell():
    figure = parameter_figures.heat_map(
        study([trial(0, value=0.4), trial(1, value=0.6), trial(2, r=8, rate=0.1, value=0.9)])
    )
    assert figure.traces[0]["z"] == [[pytest.approx(0.5), None], [None, 0.9]]
    assert figure.table[1] == [["4", "0.001", "0.5000", "2"], ["8", "0.1", "0.9000", "1"]]


def test_text_from_data_is_escaped_for_plotly():
    evil = "<b>x</b><script>alert(1)</script>"
    axes = [
        Axis(key=evil, numeric=False, log=False, values=[evil, "y"]),
        Axis(key="k", numeric=False, log=False, values=["a", "b"]),
    ]
    trials = [
        trial(i, value=0.1 * i, trainable=i + 1, curve=[(1, 0.5)], params_swept={evil: v, "k": w})
        for i, (v, w) in enumerate([(evil, "a"), ("y", "b")])
    ]
    meta = StudyMeta(name=evil, swept=[], overrides=[], metric="m<", maximize=True, created="")
    known = study(trials, metric="m<", meta=meta, axes=axes, importance={evil: 0.9, "k": 0.1})
    for figure in search_figures.figures(known):
        assert "<script" not in json.dumps([figure.traces, figure.layout]), figure.id


def test_pruning_spares_the_steps_that_finished_trials_have():
    ended = [trial(0, steps=100), trial(1, steps=100), trial(2, steps=25, state="PRUNED")]
    found = cost.cost(study(ended))
    assert (found.steps, found.steps_spared) == (225, 75)
    assert found.spared == pytest.approx(0.25)


def test_trials_at_a_time_count_only_the_time_in_which_trials_ran():
    spans = [(0, 10), (0, 10), (100, 110)]
    ended = [trial(i, began_s=a + 1, ended_s=b + 1) for i, (a, b) in enumerate(spans)]
    found = cost.cost(study(ended))
    assert found.elapsed_s == 20
    assert found.side_by_side == pytest.approx(1.5)


def test_spared_seconds_stand_in_the_report_where_they_were_measured():
    known = {"steps": 100, "train_s": 50.0}
    ended = [trial(0, **known, prefix_saved_s=30.0), trial(1, **known, prefix_saved_s=20.0)]
    ended.append(trial(2, state="PRUNED", steps=40, train_s=20.0))
    found = cost.cost(study(ended))
    assert (found.device_s, found.pruning_s, found.prefix_s, found.packing_s) == (120.0, 30.0, 50.0, None)
    told = dict(tables.costs(study(ended)).rows)
    assert told["device time spared by pruning"] == "30.0 s (20% of what it would have taken)"
    assert told["device time spared by kept frozen layers (prefix reuse)"] == "50.0 s (29% of what it would have taken)"
    assert told["device time spared by shared passes (packing)"] == "not measured"


def test_quality_is_shown_against_four_costs():
    known = [trial(i, value=0.5 + i / 10, adapter_mb=1.0 + i, peak_gib=1.5) for i in range(3)]
    fronts = {"adapter_mb": [0, 1, 2], "peak_gib": [2]}
    drawn = {f.id: f for f in search_figures.figures(study(known, fronts=fronts)) if f.id.startswith("pareto")}
    assert list(drawn) == ["pareto-trainable", "pareto-adapter_mb", "pareto-train_s", "pareto-peak_gib"]
    assert "trial 2: 0.7000 for 3.00 MB" in drawn["pareto-adapter_mb"].says
    assert drawn["pareto-adapter_mb"].layout["xaxis"]["title"]["text"] == "adapter size (MB)"
    assert traces(drawn["pareto-peak_gib"])["on the front"]["x"] == [1.5]

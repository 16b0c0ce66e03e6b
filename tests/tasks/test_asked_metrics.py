"""Functions of one's own are metrics: tried before anything trains, named with their own traceback where they fail."""

import json
import re
import sys
from pathlib import Path

import pytest
from support.studies import SMALL

from lorasweep.cli import main
from lorasweep.config import compose, trust
from lorasweep.config.spec import TaskSpec
from lorasweep.errors import ConfigError
from lorasweep.study import answer
from lorasweep.study.study import Study
from lorasweep.tasks import make

FUNCTIONS = """
def long_and_right(rows, predictions, references):
    return [len(row["text"]) * (p == r) for row, p, r in zip(rows, predictions, references, strict=True)]

def share_wrong(rows, predictions, references):
    return sum(p != r for p, r in zip(predictions, references)) / len(rows)

share_wrong.maximize = False

def broken(rows, predictions, references):
    return [row["price"] for row in rows]

def too_few(rows, predictions, references):
    return [1.0]

def words(rows, predictions, references):
    return "good"

def no_number(rows, predictions, references):
    return [float("nan")] * len(rows)

def of_one(rows):
    return 1.0
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Path(name)


def run(tiny_bert: Path, outputs: Path, *more: str) -> int:
    own = [f"model.pretrained={tiny_bert}", f"outputs={outputs}", "tracking=none", "study=s"]
    return main.main(["-m", "lora.r=2,4", *SMALL, *own, *more])


def test_value_a_row_ranks_with_intervals_and_comparisons(tiny_bert, tmp_path, own):
    more = [f"task_type.metrics=[{own}:long_and_right,auroc]", "task_type.primary=long_and_right"]
    assert run(tiny_bert, tmp_path, *more) == 0
    study = Study.open(tmp_path / "s", trusted=True)
    found = answer.answer(study)
    assert study.meta.metric == "long_and_right" and study.meta.maximize
    assert found.best is not None and found.best.interval is not None and found.compared == 1
    result = json.loads((tmp_path / "s" / "0" / "result.json").read_text())
    assert {"auroc", "accuracy", "long_and_right"} <= result["metrics"].keys()
    assert "test" in json.loads((tmp_path / "s" / str(found.best.number) / "result.json").read_text())
    (tmp_path / f"{own}.py").unlink()  # who answers needs no metric
    assert main.main(["predict", str(tmp_path / "s"), "How are lists sorted?"]) == 0


def test_one_value_for_all_ranks_without_an_interval(tiny_bert, tmp_path, own):
    more = [f"task_type.metrics=[{own}:share_wrong]", "task_type.primary=share_wrong"]
    assert run(tiny_bert, tmp_path, *more) == 0
    study = Study.open(tmp_path / "s", trusted=True)
    found = answer.answer(study)
    assert not study.meta.maximize
    assert found.best is not None and found.best.interval is None and found.compared == 0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("broken", r"fails on \d+ rows of eval:\n.*in broken\n.*KeyError: 'price'"),
        ("too_few", r"must return a number a row; it returned 1 for \d+"),
        ("words", "must return a number, or a number a row; it returned 'good'"),
        ("no_number", "must return finite numbers"),
        ("of_one", "must take rows, predictions and references"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_function_that_fails_is_named_before_anything_trains(tiny_bert, tmp_path, own, function, words, capsys):
    assert run(tiny_bert, tmp_path, f"task_type.metrics=[{own}:{function}]") == 1
    said = capsys.readouterr()
    assert re.search(words, said.err + said.out, re.DOTALL)
    assert not (tmp_path / "s").exists()


def test_module_that_is_not_there_is_named(own):
    task = make(TaskSpec(name="SEQ_CLS", metrics=["no_such_module:f"]))
    with pytest.raises(ConfigError, match="cannot be imported:\nModuleNotFoundError: No module named 'no_such_module'"):
        task.metric("f")


def test_functions_that_came_with_a_study_are_not_called_unasked():
    spec = compose.compose_trial(["task_type.metrics=[mine:f,auroc]"])
    assert trust.code_of(spec) == ["task_type.metrics=[mine:f]"]
    assert trust.without_code(spec).task_type.metrics == ["auroc"]
    with pytest.raises(ConfigError, match="s asks to call these functions of this machine's modules"):
        trust.refuse_code([spec], "s")
    trust.refuse_code([trust.without_functions(spec)], "s")


def test_generated_texts_have_further_metrics():
    names = ["rouge_1", "chrf", "pattern_match"]
    task = make(TaskSpec(name="CAUSAL_LM", generate=True, metrics=names, match_pattern="^ye"))
    texts = [("yes it is", "yes it was"), ("no", "yes")]
    found = [{"row": i, "text": text, "references": [reference]} for i, (text, reference) in enumerate(texts)]
    assert task.metric("rouge_1").value(found) == pytest.approx((2 / 3 + 0) / 2)
    assert task.metric("pattern_match").value(found) == 0.5
    assert 0 < task.metric("chrf").value(found) < 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("task_type.metrics=[auroq]", "SEQ_CLS has no 'auroq'; did you mean 'auroc'?"),
        ("task_type.metrics=['a b']", "each must be a metric's name or MODULE:FUNCTION, got 'a b'"),
        ("task_type.metrics=auroc", "task_type.metrics: must be a list"),
        ("task_type.metrics=[rouge_1]", "SEQ_CLS has no 'rouge_1'"),
        ("task_type.metrics=[cost]", "task_type.costs: must be given with task_type.metrics=[cost]"),
        ("task_type.costs={a:{b:1}}", "task_type.costs: is for the metric cost"),
        ("task_type.costs={a:{b:-1}} task_type.metrics=[cost]", "each must be a finite number from 0, got -1"),
        ("task_type.costs={a:3} task_type.metrics=[cost]", "task_type.costs: must be"),
        ("task_type.match_pattern='('", "is no regular expression"),
        ("task_type.metrics=[pattern_match]", "task_type.match_pattern: must be given"),
        ("task_type.class_weights=even", "must be balanced or a mapping of classes to numbers, got 'even'"),
        ("task_type.class_weights={a:0}", "each must be a finite number above 0, got 0"),
        ("task_type.class_weights={nowhere:2}", "'nowhere' is no class of the data"),
        ("task_type.class_weights=balanced task_type.problem_type=multi_label", "is for one class a text"),
        ("search.max_cost=2", "search.max_cost: needs search.cost_per_hour"),
        ("search.cost_per_hour=0", "search.cost_per_hour: must be above 0, got 0"),
        ("train.keep=first", "train.keep: must be one of best, last, got 'first'"),
        ("train.patience=0", "train.patience: must be at least 1, got 0"),
        ("train.max_steps=-1", "train.max_steps: must be at least 0, got -1"),
        ("search.baselines=[probe]", "search.baselines: each must be one of base, head, full, got 'probe'"),
        ("search.baselines=[head] data.max_tokens=8,16", "are of one base and one data set"),
        ("lora.full=true", "every weight trains and there is no adapter"),
        ("lora.full=true lora.target_modules=[] lora.use_dora=true", "there is no adapter, got lora.use_dora"),
        ("task_type.primary=profit", "task_type.primary: SEQ_CLS has accuracy"),
    ],
)
def test_bad_value_of_a_new_key_is_refused_in_a_sentence(tiny_bert, tmp_path, line, words, capsys):
    assert run(tiny_bert, tmp_path, *[w for w in re.findall(r"\S+='[^']*'|\S+=\['[^']*'\]|\S+", line)]) == 1
    said = capsys.readouterr()
    assert words in " ".join((said.err + said.out).split())
    assert not (tmp_path / "s").exists()

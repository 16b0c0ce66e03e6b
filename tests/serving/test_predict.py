"""Answers of a saved adapter for every task type: the ones its own evaluation gave, from a command line or a file."""

import csv
import json
from pathlib import Path

import pytest
import torch

from lorasweep.cli import main
from lorasweep.errors import ConfigError
from lorasweep.serving import predict, winner
from lorasweep.study.result import read_result
from lorasweep.tasks import task_state

SMALL = [
    "train.max_steps=2",
    "train.batch_size=4",
    "data.max_train_samples=48",
    "data.max_eval_samples=16",
    "task_type.max_new_tokens=4",
    "tracking=none",
]


def study(outputs: Path, model: Path, *overrides: str) -> Path:
    """Return the folder of trial 0 of a tiny study."""
    assert main.main([f"model.pretrained={model}", *SMALL, *overrides, f"outputs={outputs}", "study=s"]) == 0
    return outputs / "s" / "0"


@pytest.fixture(scope="module")
def classified(tiny_bert, tmp_path_factory) -> Path:
    return study(tmp_path_factory.mktemp("cls"), tiny_bert, "model.pooling=model")


def test_class_and_probability_are_the_evaluations_own(classified, capsys):
    rows = (classified / "examples.txt").read_text().split("\n\n")
    first = rows[0].splitlines()
    text = first[0].removeprefix("text: ")
    capsys.readouterr()
    assert main.main(["predict", str(classified.parent), text, "Open a socket", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 2
    assert len(text) == 500 or f"answer: {found[0]['label']}" in first
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1)
    assert found[0]["probability"] == max(found[0]["probabilities"].values())
    assert main.main(["predict", str(classified.parent), text]) == 0
    assert capsys.readouterr().out == f"{found[0]['label']}\t{found[0]['probability']:.4f}\n"


def test_answers_need_no_data(classified, monkeypatch):
    monkeypatch.setattr("lorasweep.data.dataset.load", None)
    loaded = predict.load(classified)
    assert predict.answers(loaded, ["Open a socket"])[0]["label"] in loaded.task.classes


def test_older_trial_without_task_json_reads_the_data_again(classified):
    kept = (classified / task_state.NAME).read_text()
    expected = predict.answers(predict.load(classified), ["Open a socket"])
    (classified / task_state.NAME).unlink()
    assert predict.answers(predict.load(classified), ["Open a socket"]) == expected
    (classified / task_state.NAME).write_text(kept)


def test_files_of_three_kinds_give_the_same_answers(classified, tmp_path, capsys):
    texts = ["Open a socket", "Parse, the tree"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(texts[0]) + "\n" + json.dumps({"text": texts[1]}) + "\n")
    (tmp_path / "a.csv").write_text('text,other\nOpen a socket,1\n"Parse, the tree",2\n')
    capsys.readouterr()
    out = []
    for kind in ("txt", "jsonl", "csv"):
        assert main.main(["predict", str(classified.parent), "--file", str(tmp_path / f"a.{kind}")]) == 0
        out.append(capsys.readouterr().out)
    assert out[0].count("\n") == 2 and out[0] == out[1] == out[2]


def test_a_csv_cell_is_as_long_as_it_likes(tmp_path):
    csv.field_size_limit(131_072)
    (tmp_path / "rows.csv").write_text("text\n" + "word " * 30_000 + "\n")
    assert predict.read(tmp_path / "rows.csv") == [{"text": "word " * 30_000}]


def test_a_csv_row_ends_at_line_feeds_alone(tmp_path):
    (tmp_path / "a.csv").write_text('text,id\none\u2028two\x0bthree,1\n"four\nfive",2\n', encoding="utf8")
    assert [row["text"] for row in predict.read(tmp_path / "a.csv")] == ["one\u2028two\x0bthree", "four\nfive"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give texts"),
        (["x", "--trial", "7"], "has no such trial"),
        (["x", "--trial", "best"], "must be a trial's number, got 'best'"),
        (["x", "--jsn"], "did you mean '--json'?"),
        (["   "], "has nothing in text"),
        (["--file", "a.xlsx"], "must end in .jsonl, .csv or .txt"),
        (["--file", "nowhere.csv"], "--file: there is no nowhere.csv"),
        (['{"txet": "x"}'], "got txet"),
    ],
)
def test_what_cannot_be_answered_is_refused(classified, words, told, capsys):
    assert main.main(["predict", str(classified.parent), *words]) == 1
    assert told in capsys.readouterr().err


def test_tokens_are_tagged(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert, "task_type=token_cls")
    loaded = predict.load(folder)
    (found,) = predict.answers(loaded, ["return x + 1"])
    assert found["tokens"] == ["return", "x", "+", "1"]
    assert all(tag in task_state.task_of(folder, task_state.settings(folder)).classes for tag in found["tags"])
    assert loaded.task.line(found).startswith("return/")


def test_question_is_answered_by_a_span_of_its_context(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert, "task_type=question_ans")
    loaded = predict.load(folder)
    context = "The function returns a list of names. It raises nothing."
    found = predict.answers(loaded, [{"question": "What comes back?", "context": context}] * 2)
    assert all(a["answer"] in context for a in found) and len(found) == 2
    with pytest.raises(ConfigError, match="needs question and context, as JSON"):
        predict.answers(loaded, ["What comes back?"])


def test_language_model_goes_on_with_a_text(tiny_llama, tmp_path):
    folder = study(tmp_path, tiny_llama, "task_type=causal_lm")
    loaded = predict.load(folder)
    alone = predict.answers(loaded, ["the name of"])
    together = predict.answers(loaded, ["a much longer text than the other one", "the name of"])
    ids = loaded.tokenizer("the name of", return_tensors="pt")["input_ids"][:, :-1]  # begun and not ended
    written = loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
    )
    expected = loaded.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert alone[0]["text"] == expected == together[1]["text"]
    with pytest.raises(ConfigError, match="the model reads 256"):
        predict.answers(loaded, ["name " * 300])


def test_encoder_decoder_writes(tiny_t5, tmp_path):
    folder = study(tmp_path, tiny_t5, "task_type=seq_2_seq_lm", "model.decoder=null")
    found = predict.answers(predict.load(folder), ["Open a socket", "Open a socket", "Parse"])
    assert found[0] == found[1] and all(isinstance(a["text"], str) for a in found)


def test_text_becomes_a_unit_vector_and_a_pair_its_cosine(tiny_bert, tmp_path):
    folder = study(tmp_path, tiny_bert, "task_type=feature_extraction")
    loaded = predict.load(folder)
    given = ["Open a socket", {"anchor": "Open a socket", "positive": "Parse the tree"}, "Parse the tree"]
    first, pair, second = predict.answers(loaded, given)
    a, b = torch.tensor(first["embedding"]), torch.tensor(second["embedding"])
    assert len(a) == 32 and float(a @ a) == pytest.approx(1, abs=1e-5)
    assert pair["similarity"] == pytest.approx(float(a @ b), abs=1e-5)
    assert loaded.task.line(first).startswith("32 numbers: ")


def test_trial_without_an_adapter_is_told_with_those_that_have_one(classified):
    from lorasweep.study.study import Study

    opened = Study.open(classified.parent)
    (classified / "adapter").rename(classified / "away")
    try:
        with pytest.raises(ConfigError, match="has no adapter"):
            winner.pick(opened)
    finally:
        (classified / "away").rename(classified / "adapter")
    assert winner.pick(opened) == 0 == read_result(classified).number

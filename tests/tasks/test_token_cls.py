"""TOKEN_CLS: labels on first tokens, transformers' loss, strict entity scores, the CoNLL reader."""

from pathlib import Path

import datasets
import pytest
import torch
import transformers
from support import real_data
from support.models import wordpiece

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data import dataset, readers
from lorasweep.errors import ConfigError
from lorasweep.tasks import make
from lorasweep.tasks.task import IGNORE
from lorasweep.tasks.token_cls import TokenCls

WNUT = real_data.FOLDER / "wnut17"
ROWS = [
    {"tokens": ["Empire", "State", "Building", "=", "ESB"], "tags": ["B-loc", "I-loc", "I-loc", "O", "B-loc"]},
    {"tokens": ["unbelievably", "far"], "tags": ["O", "O"]},
    {"tokens": ["Ann", "\u200d", "left", "Paris"], "tags": ["B-per", "O", "O", "B-loc"]},
]


def fitted(rows=ROWS) -> TokenCls:
    task = make(TaskSpec(name="TOKEN_CLS"))
    assert isinstance(task, TokenCls)
    assert task.fit(dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="")) == []
    return task


def test_first_token_of_each_word_is_labelled_and_no_other():
    task, tokenizer = fitted(), wordpiece()
    example = task.encode(ROWS[1:2], tokenizer, DataSpec())[0]
    words = tokenizer.convert_ids_to_tokens(example.inputs["input_ids"])
    assert len(words) > 4 and words[-2] == "far"
    outside = task.classes.index("O")
    assert example.target == [IGNORE, outside, *[IGNORE] * (len(words) - 4), outside, IGNORE]
    assert example.supervised == 2


def test_word_without_a_token_is_not_scored_and_shifts_no_label():
    task = fitted()
    example = task.encode(ROWS[2:], wordpiece(), DataSpec())[0]
    assert example.info == (0, 2, 3)
    assert [task.classes[t] for t in example.target if t != IGNORE] == ["B-per", "O", "B-loc"]
    assert any("1 words in 1 rows are not scored" in n for n in task.notes)


def test_words_beyond_max_tokens_are_counted_in_a_note():
    task = fitted()
    example = task.encode(ROWS[:1], wordpiece(), DataSpec(max_tokens=5))[0]
    assert example.supervised == 3 and "2 words in 1 rows are not scored" in task.notes[-1]


def test_loss_is_that_of_transformers(tiny_bert):
    task, tokenizer = fitted(), wordpiece()
    model = transformers.BertForTokenClassification.from_pretrained(tiny_bert, **task.model_kwargs()).eval()
    examples = task.encode(ROWS, tokenizer, DataSpec())
    for chosen in ([0, 1], [1, 2], [0, 1, 2]):
        batch = task.collate([[examples[i] for i in chosen]], tokenizer.pad_token_id)
        want = model(**batch.inputs, labels=batch.labels).loss
        torch.testing.assert_close(task.row_losses(model, batch).sum() / batch.supervised, want)
        found = task.predict(model, batch)
        assert sum(p["loss"] for p in found) == pytest.approx(float(want.detach()) * batch.supervised, rel=1e-5)
        assert sum(p["supervised"] for p in found) == batch.supervised


def predicted_as(predicted: list[str], true: list[str], row: int = 0) -> dict:
    return {"row": row, "loss": 1.5, "supervised": len(true), "prediction": predicted, "label": true}


def test_tags_without_a_scheme_are_scored_by_word():
    task = fitted([{"tokens": ["a", "b", "c"], "tags": ["N", "V", "V"]}])
    found = predicted_as(["N", "N", "V"], ["N", "V", "V"])
    expected = {"accuracy": 2 / 3, "macro_f1": 2 / 3, "macro_precision": 0.75, "macro_recall": 0.75, "loss": 0.5}
    assert task.metrics([found]) == pytest.approx(expected) and task.primary == "accuracy"
    assert task.readable({"tokens": ["a", "b", "c"]}, found | {"words": [0, 1, 2]}) == "a/N b/N c/V"
    assert task.notes == ["the tags mark no entities: words are scored one by one, by accuracy and macro F1"]


def test_readable_marks_entities_and_baseline_is_the_majority():
    task = fitted()
    found = {"prediction": ["B-loc", "I-loc", "O", "O"], "words": [0, 1, 3, 4]}
    assert task.readable(ROWS[0], found) == "[Empire State](loc) Building = ESB"
    whole = dataset.Data(splits={s: ROWS for s in dataset.SPLITS}, fingerprint="", name="")
    assert task.baseline(whole, "eval") == {"majority_accuracy": 5 / 11}


def test_tags_unknown_to_train_are_a_problem_and_iob1_is_noted():
    task = make(TaskSpec(name="TOKEN_CLS"))
    other = [{"tokens": ["x", "y"], "tags": ["I-loc", "B-org"]}]
    splits = {"train": ROWS, "eval": other, "test": ROWS}
    assert task.fit(dataset.Data(splits=splits, fingerprint="", name="")) == [
        "data.tags_column: 1 tags of eval are not in train: 'B-org'"
    ]
    assert task.notes == [
        "the tags mark entities as IOB2 does: they are scored strictly by it",
        "1 tagged words of eval are no entity by IOB2: strict scoring leaves them out",
    ]


def test_tags_of_rows_beyond_max_train_samples_are_known(tmp_path):
    lines = [f"word{i}\t{'B-rare' if i == 7 else 'O' if i % 2 else 'B-x'}\n" for i in range(200)]
    (tmp_path / "train.conll").write_text("\n".join(lines))
    (tmp_path / "dev.conll").write_text("rare\tB-rare\n")
    spec = DataSpec(
        source="conll", path=str(tmp_path), eval_split="dev", test_split="dev", max_train_samples=20, max_eval_samples=9
    )
    task = make(TaskSpec(name="TOKEN_CLS"))
    found = dataset.load(spec, task.columns(spec), "TOKEN_CLS")
    assert ["B-rare"] not in [r["tags"] for r in found.splits["train"]]
    assert task.fit(found) == [] and task.model_kwargs()["num_labels"] == 3


def test_roberta_reads_words_as_in_running_text(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["far from home far from home"] * 9, vocab_size=300, min_frequency=1)
    trained.save_model(str(tmp_path))
    tokenizer = transformers.RobertaTokenizer.from_pretrained(tmp_path)
    task = fitted([{"tokens": ["far", "from"], "tags": ["N", "V"]}])
    example = task.encode([{"tokens": ["far", "from"], "tags": ["N", "V"]}], tokenizer, DataSpec())[0]
    assert tokenizer.decode(example.inputs["input_ids"], skip_special_tokens=True) == "far from"


def conll(folder: Path, text: str) -> list[dict]:
    (folder / "train.conll").write_text(text, encoding="utf8")
    return readers.read_splits(DataSpec(source="conll", path=str(folder)))["train"].rows


def test_conll_takes_tabs_or_spaces_first_and_last_column(tmp_path):
    text = "-DOCSTART- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ O O\n\t\nNew York\tB-LOC\r\n\n\n-DOCSTART-\na\tO"
    assert conll(tmp_path, text) == [
        {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]},
        {"tokens": ["New York"], "tags": ["B-LOC"]},
        {"tokens": ["a"], "tags": ["O"]},
    ]


def test_conll_names_file_and_line_of_each_broken_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        conll(tmp_path, "a\tO\nb\n\n\tO\n\nc\t\n")
    assert [p.split(": ")[0] for p in caught.value.problems] == [f"{tmp_path}/train.conll:{n}" for n in (2, 4, 6)]


def test_words_and_tags_of_different_number_are_refused_by_row(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"tokens": ["a"], "tags": ["O"]}\n{"tokens": "a b", "tags": ["O"]}\n{"tokens": [], "tags": []}\n')
    with pytest.raises(ConfigError) as caught:
        dataset.load(DataSpec(source="jsonl", path=str(path)), {"tokens": "tokens", "tags": "tags"}, "TOKEN_CLS")
    (problem,) = caught.value.problems
    assert problem.startswith("data.bad_rows: 2 of 3 rows of train")
    assert problem.endswith(f"{path}:2: 2 words in 'tokens', 1 tags; {path}:3: has nothing in 'tokens'")


def test_class_numbers_of_a_table_become_names(tmp_path):
    tags = datasets.List(datasets.ClassLabel(names=["O", "B-x"]))
    features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": tags})
    rows = {"tokens": [["a", "b"]], "tags": [[1, 0]]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    found = readers.read_splits(DataSpec(source="parquet", path=str(tmp_path)))
    assert found["train"].rows == [{"tokens": ["a", "b"], "tags": ["B-x", "O"]}]


@real_data.needs("wnut17")
def test_wnut17_has_its_published_sizes():
    spec = DataSpec(
        source="conll",
        path=str(WNUT),
        train_split="wnut17train",
        eval_split="dev",
        test_split="emerging.test.annotated",
    )
    splits = {name: table.rows for name, table in readers.read_splits(spec).items()}
    sizes = [(len(rows), sum(len(r["tokens"]) for r in rows)) for rows in splits.values()]
    assert sizes == [(3394, 62730), (1009, 15733), (1287, 23394)]
    assert len({t for r in splits["train"] for t in r["tags"]}) == 13


def test_built_in_rows_are_lines_of_python_with_kinds():
    found = dataset.load(DataSpec(), {}, "python_tokens")
    rows = [r for split in found.splits.values() for r in split]
    assert 1000 <= len(rows) <= 2000 and len({tuple(r["tokens"]) for r in rows}) == len(rows)
    assert all(5 <= len(r["tokens"]) == len(r["tags"]) <= 60 for r in rows)
    assert {t for r in rows for t in r["tags"]} == {"OP", "NAME", "KEYWORD", "STRING", "COMMENT", "NUMBER"}

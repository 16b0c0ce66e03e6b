"""What data are: a changed file is seen, pairs stay together, splits hold their classes, running text is kept whole."""

import csv
import os
import random

import pytest
from support.models import wordpiece

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data import dataset, text_blocks
from lorasweep.data.carve import PAIRS, carve, place
from lorasweep.errors import ConfigError
from lorasweep.tasks.causal_lm import CausalLM
from lorasweep.tasks.token_lengths import settle_max_tokens

FIELDS = {"text": "text", "label": "label"}


def test_a_changed_file_is_seen(tmp_path):
    path = tmp_path / "train.csv"
    spec = DataSpec(source="csv", path=str(path))
    path.write_text("text,label\n" + "".join(f"text number {i},{'ab'[i % 2]}\n" for i in range(60)))
    one = dataset.load(spec, FIELDS, "SEQ_CLS")
    assert dataset.load(spec, FIELDS, "SEQ_CLS") is one
    path.write_text("text,label\n" + "".join(f"text number {i},{'xy'[i % 2]}\n" for i in range(60)))
    os.utime(path, ns=(1, 1))
    two = dataset.load(spec, FIELDS, "SEQ_CLS")
    assert two.labels == ("x", "y") and two.fingerprint != one.fingerprint


LONG = "word " * 30_000
"""More characters than Python's csv module takes in one cell, unless it is told otherwise."""


def test_a_long_cell_is_read_in_a_fresh_process(tmp_path):
    csv.field_size_limit(131_072)
    path = tmp_path / "train.csv"
    path.write_text("text,label\n" + "".join(f"{LONG}{i},{'ab'[i % 2]}\n" for i in range(12)))
    found = dataset.load(DataSpec(source="csv", path=str(path)), FIELDS, "SEQ_CLS")
    assert {len(r["text"]) // 1000 for r in found.splits["train"]} == {150}


def test_pairs_in_either_order_stay_in_one_split():
    a, b = "a man eats", "a man is eating"
    assert place({"text": a, "text_pair": b, "score": 5}) == place({"text": b, "text_pair": a, "score": 1})


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("more", [{}, {"negative": "a dog sleeps"}])
def test_swapped_pairs_are_carved_together(first, second, more):
    pairs = [(f"text {i}", f"meaning {i}") for i in range(300)]
    rows = [{first: a, second: b, **more} for a, b in pairs] + [{first: b.upper(), second: f" {a}"} for a, b in pairs]
    found = carve(rows, {"eval": 0.1, "test": 0.1}, "")
    kept = [{frozenset((r[first].strip().lower(), r[second].strip().lower())) for r in part} for part in found.values()]
    assert sum(map(len, kept)) == 300 and [len(part) for part in found.values()] == [480, 60, 60]


def test_chain_of_swapped_pairs_is_carved_together():
    names = ["d", "a", "c", "b", "e"]
    chain = [(names[i], names[i + 1]) for i in range(4)]
    rows = [{"anchor": a, "positive": b} for pair in chain for a, b in (pair, pair[::-1])]
    others = [{"anchor": f"text {i}", "positive": f"meaning {i}"} for i in range(200)]
    found = carve(others + rows, {"eval": 0.2, "test": 0.2}, "")
    assert sum(any(r in rows for r in part) for part in found.values()) == 1


def test_pairs_that_are_not_swapped_are_carved_by_the_first_text_alone():
    pairs = [{"anchor": f"text {i // 2}", "positive": f"meaning {i}"} for i in range(300)]
    found = carve(pairs, {"eval": 0.1, "test": 0.1}, "")
    alone = carve([{"anchor": r["anchor"]} for r in pairs], {"eval": 0.1, "test": 0.1}, "")
    assert {n: [r["anchor"] for r in part] for n, part in found.items()} == {
        n: [r["anchor"] for r in part] for n, part in alone.items()
    }


def test_carved_splits_have_trains_proportions_and_every_class_stays_in_train():
    names = ["often"] * 700 + ["seldom"] * 290 + [f"once {i}" for i in range(10)]
    found = carve([{"text": f"row {i}", "label": n} for i, n in enumerate(names)], {"eval": 0.1, "test": 0.1}, "label")
    counts = {s: [sum(r["label"] == n for r in rows) for n in ("often", "seldom")] for s, rows in found.items()}
    assert [len(found[s]) for s in ("train", "eval", "test")] == [800, 100, 100]
    assert counts["eval"] == pytest.approx([70, 30], abs=1) and counts["test"] == pytest.approx([70, 30], abs=1)
    assert {r["label"] for r in found["train"]} == set(names)


def test_rows_of_one_text_are_carved_together():
    rows = [{"text": f"text {i // 3}", "label": "ab"[i % 2]} for i in range(300)]
    found = carve(rows, {"eval": 0.1, "test": 0.1}, "label")
    texts = [{r["text"] for r in part} for part in found.values()]
    assert sum(map(len, texts)) == 100


def test_running_text_is_cut_by_the_models_own_tokens_and_none_is_lost(tmp_path):
    characters = "中文维基百科是由志愿者共同编写的自由百科全书任何人都可以参与编辑条目内容"  # a token each
    draw = random.Random(0)
    paragraphs = ["".join(draw.choice(characters) for _ in range(180)) for _ in range(60)]
    path = tmp_path / "train.txt"
    path.write_text("\n\n".join(paragraphs), encoding="utf8")
    tokenizer = wordpiece()
    spec = DataSpec(source="text", path=str(path), max_tokens=128)
    found = dataset.load(
        spec,
        {"text": "text"},
        "CAUSAL_LM",
        count=lambda texts: [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]],
        tokenizer="words",
    )
    blocks = [r for rows in found.splits.values() for r in rows]
    examples = CausalLM(TaskSpec(name="CAUSAL_LM")).encode(blocks, tokenizer, spec)
    assert max(map(len, examples)) <= 128
    ends = [e.inputs["input_ids"][-1] == tokenizer.sep_token_id for e in examples]
    assert ends.count(True) == 1, "the text ends once"
    assert sum(len(e) - 1 for e in examples) - 1 == 60 * 180


def test_blocks_hold_whole_paragraphs_and_long_ones_are_cut_at_sentences():
    text = "one two three.\n\nfour five.\n\n" + "six seven eight nine. ten eleven twelve."
    count = lambda texts: [len(t.split()) for t in texts]  # noqa: E731
    assert text_blocks.blocks(text, 5, count) == [
        "one two three.\n\nfour five.",
        "six seven eight nine.",
        "ten eleven twelve.",
    ]


def test_blocks_are_shorter_in_a_short_text():
    count = lambda texts: [len(t.split()) for t in texts]  # noqa: E731
    assert [text_blocks.fair_length("word " * n, count) for n in (100, 4000, 10**6)] == [32, 100, 256]


def test_max_tokens_comes_from_the_data_within_what_the_model_reads():
    tokenizer, task = wordpiece(), CausalLM(TaskSpec(name="CAUSAL_LM"))
    rows = [{"text": "word " * n} for n in [*range(100, 299), 2000]]
    spec, notes = settle_max_tokens(task, rows, tokenizer, DataSpec())
    assert spec.max_tokens == 304 and "longest 2002 tokens, 0.5% of train is longer" in notes[0]
    tokenizer.model_max_length = 256
    assert settle_max_tokens(task, rows, tokenizer, DataSpec())[0].max_tokens == 256
    assert settle_max_tokens(task, rows, tokenizer, DataSpec(max_tokens=20)) == (DataSpec(max_tokens=20), [])
    assert task.notes == []


def test_a_missing_file_is_told_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=rf"no file or folder 'gone.csv' \(looked from {tmp_path}\)"):
        dataset.load(DataSpec(source="csv", path="gone.csv"), FIELDS, "SEQ_CLS")

"""What is longer than data.max_tokens is counted in every task, and refused where data.too_long says so."""

from dataclasses import replace

import pytest
from support.models import wordpiece

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.errors import ConfigError
from lorasweep.tasks import make

SHORT, LONG = "the cat sat", "the cat sat on the mat " * 20
ANSWERED = {"question": "where", "answers": [{"text": f"word {LONG}mat", "start": 4}]}

CASES = {
    "SEQ_CLS": ([{"text": SHORT, "label": "a"}] * 3 + [{"text": LONG, "label": "b"}], "1 of 4 rows are longer than"),
    "SEQ_CLS pairs": (
        [{"text": SHORT, "text_pair": SHORT, "label": "a"}, {"text": SHORT, "text_pair": LONG, "label": "b"}],
        "1 of 2 rows are longer than",
    ),
    "FEATURE_EXTRACTION": (
        [{"anchor": SHORT, "positive": LONG}, {"anchor": SHORT, "positive": SHORT}],
        "1 of 2 texts in 'positive' are longer than",
    ),
    "SEQ_2_SEQ_LM": ([{"source": LONG, "target": SHORT}, {"source": SHORT, "target": SHORT}], "1 of 2 sources are"),
    "SEQ_2_SEQ_LM targets": ([{"source": SHORT, "target": LONG}, {"source": SHORT, "target": SHORT}], "1 of 2 targets"),
    "QUESTION_ANS": ([{"question": LONG, "context": SHORT, "answers": []}], "1 of 1 questions fill more than half"),
    "QUESTION_ANS answers": (
        [ANSWERED | {"context": f"the word {LONG}mat"}, {"question": "who", "context": LONG, "answers": []}],
        "1 of 2 records have an answer that no window",
    ),
    "TOKEN_CLS": (
        [{"tokens": SHORT.split(), "tags": ["O"] * 3}, {"tokens": LONG.split(), "tags": ["X"] * 120}],
        "90 words in 1 rows are not scored, of 123 in 2",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_cut_are_counted_or_refused(case):
    rows, told = CASES[case]
    spec = DataSpec(max_tokens=32, max_target_tokens=32, doc_stride=8)
    task = make(TaskSpec(name=case.partition(" ")[0]))
    task.classes = ["O", "X"] if "tags" in rows[0] else ["a", "b"]
    examples = task.encode(rows, wordpiece(), spec)
    assert max(map(len, examples)) <= 32 and {e.row for e in examples} == set(range(len(rows)))
    assert [n for n in task.notes if told in n] == task.notes and len(task.notes) == 1
    with pytest.raises(ConfigError, match=r"data\.too_long"):
        task.encode(rows, wordpiece(), replace(spec, too_long="error"))
    whole = replace(spec, max_tokens=1000, max_target_tokens=1000, too_long="error")
    task.notes.clear()
    task.encode(rows, wordpiece(), whole)
    assert task.notes == []


def test_text_that_is_cut_keeps_what_ends_it():
    task = make(TaskSpec(name="SEQ_CLS"))
    task.classes = ["a", "b"]
    (example,) = task.encode([{"text": LONG, "label": "a"}], wordpiece(), DataSpec(max_tokens=16))
    assert list(example.inputs["input_ids"]) == wordpiece()(LONG, truncation=True, max_length=16)["input_ids"]


def test_an_input_to_answer_is_never_refused_for_its_length():
    task = make(TaskSpec(name="SEQ_CLS"))
    task.classes = ["a", "b"]
    assert task.encode_input({"text": LONG}, wordpiece(), DataSpec(max_tokens=16, too_long="error"))

"""Words of TOKEN_CLS are read as in running text, whatever a tokenizer knows words by."""

import pytest
from support.models import wordpiece
from support.tokenizers import START, byte_level

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.tasks import make, running_text
from lorasweep.tasks.task import IGNORE

WORDS = ["in", "New", "York", "the", "cat's", "mat", "left", ",", "42", "times"]
TOKENIZERS = {
    "wordpiece": wordpiece,
    **{kind: lambda kind=kind: byte_level(kind) for kind in ("gpt2", "llama3", "smollm2")},
    "llama3 with a start": lambda: byte_level("llama3", around=(START, "")),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_are_those_of_the_text_and_labels_stand_on_each_words_first(kind):
    tokenizer, task = TOKENIZERS[kind](), make(TaskSpec(name="TOKEN_CLS"))
    task.classes = [f"B-{i}" for i in range(len(WORDS))]
    (example,) = task.encode([{"tokens": WORDS, "tags": task.classes}], tokenizer, DataSpec())
    found = tokenizer(" ".join(WORDS), return_offsets_mapping=True)
    assert list(example.inputs["input_ids"]) == list(found["input_ids"]), "as plain transformers reads the text"
    text, start = " ".join(WORDS), 0
    for i, word in enumerate(WORDS):
        begin, end = found["offset_mapping"][example.target.index(i)]
        assert text[begin:end].strip() and start <= begin + text[begin:end].count(" ") < start + len(word)
        start += len(word) + 1
    assert sum(t != IGNORE for t in example.target) == len(WORDS)


def test_encoding_leaves_the_tokenizer_as_it_was():
    tokenizer, task = byte_level("gpt2"), make(TaskSpec(name="TOKEN_CLS"))
    before, task.classes = tokenizer.backend_tokenizer.pre_tokenizer.__getstate__(), ["O"]
    task.encode([{"tokens": ["the", "cat"], "tags": ["O", "O"]}], tokenizer, DataSpec())
    assert tokenizer.backend_tokenizer.pre_tokenizer.__getstate__() == before


def test_scripts_without_spaces_get_none():
    rows = [["我", "在", "New", "York", "。"], ["the", "猫"], ["「", "中", "国", "」", "、", "日"], ["ไทย", "คน", "a"]]
    assert running_text.spaced(byte_level(), rows) == [
        ["我", "在", " New", " York", "。"],
        ["the", " 猫"],
        ["「", "中", "国", "」", "、", "日"],
        ["ไทย", "คน", " a"],
    ]
    assert running_text.spaced(wordpiece(), rows) == rows

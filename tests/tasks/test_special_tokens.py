"""What a tokenizer puts around a text is asked of it, for training and for answering, and never put twice."""

import pytest
from support.models import wordpiece
from support.tokenizers import END, START, byte_level

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.tasks import make, special_tokens
from lorasweep.tasks.task import IGNORE

AROUND = {"nothing": ("", ""), "Llama 3": (START, ""), "both": (START, END), "an end": ("", END)}


@pytest.mark.parametrize("kind", AROUND)
def test_what_the_post_processor_alone_puts_there_is_found(kind):
    tokenizer = byte_level(around=AROUND[kind])
    before, after = special_tokens.around(tokenizer)
    assert [tokenizer.decode(before), tokenizer.decode(after)] == list(AROUND[kind])
    assert not getattr(tokenizer, "add_bos_token", False), "which is why the attribute is not asked"


def learned(tokenizer, **fields) -> tuple[str, str]:
    """Return what is read of a record, and what of that is learned."""
    task = make(TaskSpec(name="CAUSAL_LM"))
    (example,) = task.encode([fields], tokenizer, DataSpec(prompt_suffix=""))
    return tokenizer.decode(example.inputs["input_ids"]), tokenizer.decode([t for t in example.target if t != IGNORE])


@pytest.mark.parametrize("kind", AROUND)
def test_prompt_is_begun_and_answer_ended_once(kind):
    tokenizer, before = byte_level(around=AROUND[kind]), AROUND[kind][0]
    assert learned(tokenizer, prompt="the cat", completion=" sat") == (f"{before}the cat sat{END}", f" sat{END}")
    assert learned(tokenizer, text="the cat") == (f"{before}the cat{END}", f"the cat{END}")
    written = {"prompt": f"{before}the cat", "completion": f" sat{END}"}
    assert learned(tokenizer, **written) == (f"{before}the cat sat{END}", f" sat{END}")
    assert learned(tokenizer, text=f"{before}the cat{END}") == (f"{before}the cat{END}", f"the cat{END}")


def test_tokens_of_a_plain_text_are_those_of_the_tokenizer_itself():
    for tokenizer in (wordpiece(), byte_level(around=(START, END))):
        task = make(TaskSpec(name="CAUSAL_LM"))
        (example,) = task.encode([{"text": "the cat sat"}], tokenizer, DataSpec())
        assert list(example.inputs["input_ids"]) == list(tokenizer("the cat sat")["input_ids"])


@pytest.mark.parametrize("kind", AROUND)
def test_caller_that_knows_add_special_tokens_alone_reads_the_same_prompt(kind):
    tokenizer = byte_level(around=AROUND[kind])
    task = make(TaskSpec(name="CAUSAL_LM", generate=True))
    (example,) = task.encode([{"prompt": "the cat", "completion": ""}], tokenizer, DataSpec(prompt_suffix=""))
    add, before = special_tokens.asked_for(tokenizer)
    assert list(tokenizer(f"{before}the cat", add_special_tokens=add)["input_ids"]) == list(example.info[0])


MARKS = {"BERT": "[CLS] [SEP]", "Llama 3": f"{START} ", "both": f"{START} {END}"}

TASKS = {
    "SEQ_CLS": {"text": "the cat", "label": "a"},
    "SEQ_CLS pairs": {"text": "the cat", "text_pair": "sat on the mat", "label": "a"},
    "SEQ_2_SEQ_LM": {"source": "the cat", "target": "sat"},
    "FEATURE_EXTRACTION": {"anchor": "the cat", "positive": "sat"},
    "QUESTION_ANS": {"question": "the cat", "context": "sat on the mat", "answers": []},
}


@pytest.mark.parametrize("kind", MARKS)
@pytest.mark.parametrize("name", TASKS)
def test_text_that_brings_what_begins_and_ends_it_is_read_as_without(name, kind):
    tokenizer = wordpiece() if kind == "BERT" else byte_level(around=AROUND[kind])
    before, _, after = MARKS[kind].partition(" ")
    task = make(TaskSpec(name=name.partition(" ")[0]))
    task.classes = ["a", "b"]
    texts = {k: v for k, v in TASKS[name].items() if k not in ("label", "answers", "context")}
    marked = TASKS[name] | {k: f"{before}{v}{after}" for k, v in texts.items()}
    plain, found = (task.encode([record], tokenizer, DataSpec(max_tokens=64)) for record in (TASKS[name], marked))
    assert [(list(e.inputs["input_ids"]), e.target) for e in found] == [
        (list(e.inputs["input_ids"]), e.target) for e in plain
    ]
    spaced = TASKS[name] | {k: f" {before} {v}" + (f" {after}\n" if after else "") for k, v in texts.items()}
    again = task.encode([spaced], tokenizer, DataSpec(max_tokens=64))
    assert [list(e.inputs["input_ids"]) for e in again] == [list(e.inputs["input_ids"]) for e in plain]


@pytest.mark.parametrize("kind", MARKS)
def test_context_and_words_that_bring_the_start_have_it_once(kind):
    tokenizer = wordpiece() if kind == "BERT" else byte_level(around=AROUND[kind])
    before = MARKS[kind].partition(" ")[0]
    first = special_tokens.around(tokenizer)[0]
    answers = [{"text": "mat", "start": len(before) + 11}]
    record = {"question": "where", "context": f"{before}sat on the mat", "answers": answers}
    (example,) = make(TaskSpec(name="QUESTION_ANS")).encode([record], tokenizer, DataSpec(max_tokens=64))
    ids = list(example.inputs["input_ids"])
    assert ids.count(first[0]) == list(tokenizer("where", "sat")["input_ids"]).count(first[0])
    place = example.info.offsets[example.target[0]]
    assert record["context"][place[0] : example.info.offsets[example.target[1]][1]].strip() == "mat"
    tagger = make(TaskSpec(name="TOKEN_CLS"))
    tagger.classes = ["B-X", "O"]
    words = {"tokens": [before, "the", "cat"], "tags": ["O", "O", "B-X"]}
    (example,) = tagger.encode([words], tokenizer, DataSpec(max_tokens=64, too_long="truncate"))
    assert list(example.inputs["input_ids"]).count(first[0]) == 1 and example.info == (1, 2)


def test_completion_that_brings_the_start_does_not_put_it_into_the_middle():
    tokenizer = byte_level(around=AROUND["both"])
    assert learned(tokenizer, prompt="the cat", completion=f"{START} sat") == (f"{START}the cat sat{END}", f" sat{END}")

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

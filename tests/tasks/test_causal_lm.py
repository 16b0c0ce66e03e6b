"""CAUSAL_LM: transformers' loss, the chunked head, chats, generated answers, plain text files."""

import pytest
import torch
import transformers
from support.models import wordpiece
from support.tokenizers import byte_level

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data import dataset
from lorasweep.errors import ConfigError
from lorasweep.tasks import generation, lm_head, make
from lorasweep.tasks.causal_lm import CausalLM
from lorasweep.tasks.chat_template import Rewritten, chat_turns, give_template
from lorasweep.tasks.lm_head import Change, HeadLoss
from lorasweep.tasks.task import IGNORE

PROMPTS = [
    {"prompt": "How many legs has a dog?", "completion": "Four."},
    {"prompt": "And a bird that flies over the sea?", "completion": "It has two legs and two wings."},
    {"prompt": "A fish?", "completion": "None"},
]
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one plus one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "and one more"},
    {"role": "assistant", "content": "three then"},
]
TEMPLATE = (
    "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] assistant {% endif %}"
)


def task_of(**keys) -> CausalLM:
    task = make(TaskSpec(name="CAUSAL_LM", **keys))
    assert isinstance(task, CausalLM)
    return task


def words(template: str | None = None) -> transformers.PreTrainedTokenizerBase:
    tokenizer = wordpiece()
    tokenizer.eos_token = "[SEP]"
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def llama(tiny_llama):
    return transformers.LlamaForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)


def test_loss_is_that_of_transformers_with_the_prompt_masked(llama, monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 4 * len(wordpiece()))
    task = task_of()
    examples = task.encode(PROMPTS, words(), DataSpec())
    for part in (examples[:2], examples[2:], examples):
        batch = task.collate([part], 0)
        with torch.no_grad():
            theirs = llama(**batch.inputs, labels=batch.labels).loss
            ours = task.row_losses(llama, batch).sum() / batch.supervised
            found = task.metrics(task.predict(llama, batch))
        torch.testing.assert_close(ours, theirs)
        assert found["loss"] == pytest.approx(float(theirs), rel=1e-5)


def test_completion_and_end_token_are_learned_and_nothing_else():
    example = task_of().encode(PROMPTS[:1], words(), DataSpec())[0]
    learned = [i for i in example.target if i != IGNORE]
    assert words().convert_ids_to_tokens(learned) == ["four", ".", "[SEP]"]
    assert example.target[-3:] == learned == list(example.inputs["input_ids"][-3:])


@pytest.mark.parametrize("change", [Change(), Change(scale=0.3), Change(cap=1.5)])
@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_head_loss_and_gradients_do_not_depend_on_the_chunks(rows, change, monkeypatch):
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", rows * 11)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5).double(), torch.randn(11).double()
    targets, slopes = torch.randint(11, (7,)), torch.rand(7).double()
    ours, theirs = (hidden.clone().requires_grad_() for _ in range(2))
    losses, hits = HeadLoss.apply(ours, weight, bias, targets, change)
    logits = change.scale * torch.nn.functional.linear(theirs, weight, bias)
    logits = change.cap * torch.tanh(logits / change.cap) if change.cap else logits
    full = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (losses * slopes).sum().backward()
    (full * slopes).sum().backward()
    torch.testing.assert_close(losses, full)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.equal(hits, logits.argmax(-1) == targets)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
CHANGED = {
    "gemma2": ({"final_logit_softcapping": 0.25}, Change(cap=0.25)),
    "granite": ({"logits_scaling": 3.0}, Change(scale=1 / 3)),
    "cohere": ({"logit_scale": 0.0625}, Change(scale=0.0625)),
    "recurrent_gemma": ({"logits_soft_cap": 0.25, "lru_width": 32}, Change(cap=0.25)),
    "falcon_h1": (
        {"lm_head_multiplier": 0.3, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_d_head": 16},
        Change(scale=0.3),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CHANGED)
def test_what_a_model_does_to_its_logits_is_done_to_chunks(family, dtype, monkeypatch):
    """The Gemmas bend them, the others scale them; their own forward with labels is the measure."""
    monkeypatch.setattr(lm_head, "CHUNK_LOGITS", 4 * len(wordpiece()))
    more, expected = CHANGED[family]
    config = transformers.AutoConfig.for_model(family, vocab_size=len(wordpiece()), **SMALL, **more)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config).eval().to(dtype).requires_grad_(False)
    net.get_output_embeddings().weight *= 20
    task, near = task_of(), {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    batch = task.collate([task.encode(PROMPTS, words(), DataSpec())], 0)
    found, norm = [], [p for n, p in net.named_parameters() if "norm" in n][-1].requires_grad_()
    for loss in (
        lambda: task.row_losses(net, batch).sum() / batch.supervised,
        lambda: net(**batch.inputs, labels=batch.labels, use_cache=False).loss,
    ):
        norm.grad = None
        value = loss()
        value.backward()
        found.append((value.detach().float(), norm.grad.clone()))
    assert task.head.change == expected
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **near)


def test_what_is_not_known_of_a_model_makes_its_own_forward_do_all(llama):
    task, forward = task_of(), llama.forward

    def biased(**inputs):
        out = forward(**inputs)
        out.logits = out.logits + torch.linspace(0, 1, out.logits.shape[-1])
        return out

    llama.forward = biased
    batch = task.collate([task.encode(PROMPTS, words(), DataSpec())], 0)
    theirs = torch.nn.functional.cross_entropy(
        llama(**batch.inputs).logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(task.row_losses(llama, batch).sum(), theirs)
    assert task.head.change is None


# --- chats -----------------------------------------------------------------------------------------------------------


def test_only_the_assistants_turns_are_learned():
    tokenizer = words(TEMPLATE)
    task = task_of()
    assert task.columns(DataSpec(messages_column="chat")) == {"messages": "chat"}
    example = task.encode([{"messages": CHAT}], tokenizer, DataSpec())[0]
    whole = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert list(example.inputs["input_ids"]) == whole
    learned = [i for i in example.target if i != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learned) == ["two", "[SEP]", "three", "then", "[SEP]"]
    assert all(t in (IGNORE, i) for t, i in zip(example.target, whole, strict=True))
    assert task.stop == (tokenizer.sep_token_id,)


def test_template_that_rewrites_earlier_turns_gives_an_example_an_answer_as_inference_sees_it():
    thinking = (
        "{% for m in messages %}[CLS] {{ m.role }} {% if m.role == 'assistant' and loop.last %}[MASK] {% endif %}"
        "{{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}[CLS] assistant {% endif %}"
    )
    tokenizer = words(thinking)
    with pytest.raises(Rewritten):
        chat_turns(tokenizer, CHAT, "row 1")
    examples = task_of().encode([{"messages": CHAT}], tokenizer, DataSpec())
    assert [e.row for e in examples] == [0, 0]
    for example, end in zip(examples, (3, 5), strict=True):
        prompt = tokenizer.apply_chat_template(CHAT[: end - 1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(CHAT[:end], return_dict=False)
        assert example.inputs["input_ids"] == whole
        assert example.target == [IGNORE] * len(prompt) + whole[len(prompt) :]


def test_tools_are_given_to_the_template():
    template = "{% if tools %}{{ tools[0].function.name }} {% endif %}" + TEMPLATE
    tools = [{"type": "function", "function": {"name": "weather"}}]
    tokenizer = words(template)
    example = task_of().encode([{"messages": CHAT[:3], "tools": tools}], tokenizer, DataSpec())[0]
    assert tokenizer.convert_ids_to_tokens(example.inputs["input_ids"][:2]) == ["weather", "[CLS]"]


def test_chatml_is_given_where_the_tokenizer_has_no_template():
    tokenizer = words()
    text = give_template(tokenizer, "chatml")
    assert tokenizer.chat_template == text
    example = task_of().encode([{"messages": CHAT[:3]}], tokenizer, DataSpec())[0]
    learned = [i for i in example.target if i != IGNORE]
    assert tokenizer.convert_ids_to_tokens(learned) == ["two", "[SEP]"]


# --- longer than max_tokens ------------------------------------------------------------------------------------------


def long_rows(*lengths: int) -> list[dict]:
    return [{"prompt": "word " * n, "completion": "yes it is"} for n in lengths]


def test_prompts_that_fill_max_tokens_are_refused_beyond_a_twentieth_and_else_counted():
    spec = DataSpec(max_tokens=32)
    with pytest.raises(ConfigError, match=r"data\.too_long: 3 of 6 rows .*max_tokens=32.*\(row 4, row 5, row 6\)"):
        task_of().encode(long_rows(5, 20, 26, 40, 60, 100), words(), spec)
    task = task_of()
    assert len(task.encode(long_rows(*[5] * 39, 100), words(), spec)) == 39
    assert task.notes == ["1 of 40 rows have a prompt that fills data.max_tokens=32 and are left out"]
    assert len(task_of().encode(long_rows(5, 40, 60), words(), DataSpec(max_tokens=32, too_long="drop"))) == 1
    with pytest.raises(ConfigError, match="1 of 40"):
        task_of().encode(long_rows(*[5] * 39, 100), words(), DataSpec(max_tokens=32, too_long="error"))


def test_truncation_keeps_the_answer_and_cuts_the_prompts_left():
    task = task_of()
    examples = task.encode(long_rows(5, 100), words(), DataSpec(max_tokens=32, too_long="truncate"))
    assert [len(e) for e in examples] == [10, 32]
    assert {words().convert_ids_to_tokens(e.inputs["input_ids"][0]) for e in examples} == {"[CLS]"}
    learned = [[i for i in e.target if i != IGNORE] for e in examples]
    assert learned[0] == learned[1] and words().convert_ids_to_tokens(learned[1]) == ["yes", "it", "is", "[SEP]"]
    assert task.notes == ["1 of 2 prompts are cut at their left to data.max_tokens"]


def test_opening_that_goes_on_otherwise_than_the_template_is_read_as_far_as_both_agree():
    plain = "{% for m in messages %}[CLS] {{ m.role }} {{ m.content }} [SEP] {% endfor %}"
    plain += "{% if add_generation_prompt %}[CLS] assistant think {% endif %}"
    parts = chat_turns(words(plain), CHAT[:3], "row 1")
    assert words().convert_ids_to_tokens(parts[0][1]) == ["two", "[SEP]"]


def test_tokenizer_without_a_template_and_template_that_objects_are_refused():
    for template in (None, "{{ raise_exception('roles must alternate') }}"):
        with pytest.raises(
            ConfigError,
            match=r"cannot write out the chat of row 1|has no chat template; give data.chat_template=chatml",
        ):
            task_of().encode([{"messages": CHAT}], words(template), DataSpec())


def test_chats_are_checked_row_by_row_and_placed_by_what_was_asked(tmp_path):
    import json

    chats = [[{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": "yes"}] for i in range(60)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats), encoding="utf8")
    spec = DataSpec(source="jsonl", path=str(path), messages_column="messages")
    found = dataset.load(spec, {"messages": "messages"}, "CAUSAL_LM")
    assert all(len(rows) < 60 for rows in found.splits.values())
    path.write_text(json.dumps({"messages": chats[0][:1]}) + "\n" + json.dumps({"messages": "hi"}), encoding="utf8")
    with pytest.raises(ConfigError) as caught:
        dataset.load(
            DataSpec(source="jsonl", path=str(path), messages_column="messages", max_tokens=77),
            {"messages": "messages"},
            "CAUSAL_LM",
        )
    (problem,) = caught.value.problems
    assert problem.startswith("data.bad_rows: 2 of 2 rows of train")
    assert f"{path}:1: 'messages' has no message of the role assistant" in problem and f"{path}:2: " in problem


THINKING = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<User>{{ m['content'] }}"
    "{% else %}<Assistant>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
"""Opens an answer otherwise than it writes one down, as DeepSeek-R1's template does."""


def thinker() -> transformers.PreTrainedTokenizerBase:
    tokenizer = byte_level()
    tokenizer.add_tokens(["<User>", "<Assistant>", "<think>"])
    tokenizer.chat_template = THINKING
    return tokenizer


def test_header_that_is_opened_otherwise_than_written_is_not_learned():
    tokenizer = thinker()
    chat = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    parts = [(tokenizer.decode(read), tokenizer.decode(own)) for read, own in chat_turns(tokenizer, chat, "row 1")]
    assert parts == [("<User>a<Assistant>", "b<|end|>"), ("<User>c<Assistant>", "d<|end|>")]
    task = task_of(generate=True)
    (example,) = task.encode([{"messages": chat}], tokenizer, DataSpec())
    assert tokenizer.decode(example.info[0]) == "<User>a<Assistant>b<|end|><User>c<Assistant><think>\n", "as others ask"


def test_header_of_an_answer_that_begins_a_chat_is_not_learned():
    tokenizer = thinker()
    chat = [{"role": r, "content": c} for r, c in (("assistant", "a"), ("user", "b"), ("assistant", "c"))]
    parts = [(tokenizer.decode(read), tokenizer.decode(own)) for read, own in chat_turns(tokenizer, chat, "row 1")]
    assert parts == [("<Assistant>", "a<|end|>"), ("<User>b<Assistant>", "c<|end|>")]


def test_what_template_and_opening_share_reaches_into_no_earlier_turn():
    tokenizer = thinker()
    tokenizer.chat_template = (
        "{% for m in messages %}<User>{{ m['content'] }}{% if loop.last %}y{% else %}x{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        chat_turns(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "row 1")


# --- generated answers -----------------------------------------------------------------------------------------------


@pytest.fixture
def echo(tiny_llama):
    """Return a model that repeats the prompt's last token for ever, and never anything else."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_llama).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.nn.functional.normalize(torch.randn(30522, 32), dim=-1))
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    return model


def test_exact_match_counts_generated_answers(echo):
    rows = [
        {"prompt": "say yes", "completion": "yes yes"},
        {"prompt": "here a longer prompt that says no", "completion": "yes yes"},
        {"prompt": "maybe", "completion": "maybe maybe"},
    ]
    task = task_of(generate=True, max_new_tokens=2)
    examples = task.encode(rows, words(), DataSpec(prompt_suffix=" "))
    with torch.inference_mode():
        found = task.predict(echo, task.collate([examples], 0))
    assert [p["text"] for p in found] == ["yes yes", "no no", "maybe maybe"]
    assert task.metrics(found)["exact_match"] == pytest.approx(2 / 3)
    assert task.metric_names[-1] == "exact_match" and task.primary == "loss"
    assert task.readable(rows[0], found[0]) == "yes yes"


def test_generation_ends_at_the_stop_token(echo):
    ids, mask = generation.padded_left([[2748, 2748], [102]], 0, "cpu")
    with torch.inference_mode():
        assert generation.greedy(echo, ids, mask, words(), 3) == ["yes yes yes", ""]
        assert generation.greedy(echo, ids, mask, words(), 3, stop=[2748]) == ["yes", ""]


def test_generate_samples_limits_the_rows_that_are_answered():
    task = task_of(generate=True, generate_samples=2)
    examples = task.encode(PROMPTS, words(), DataSpec())
    assert [bool(e.info) for e in examples] == [True, True, False]
    assert all(e.info is None for e in task_of().encode(PROMPTS, words(), DataSpec()))


def test_plain_text_asks_for_no_answer():
    rows = [{"text": "Just some text."}]
    splits = dataset.Data(splits={s: rows for s in dataset.SPLITS}, fingerprint="", name="")
    assert "plain text asks for no answer" in task_of(generate=True).fit(splits)[0]
    assert task_of().fit(splits) == []


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        ("so 3 + 4 = 7\n#### 7", "It is 7. #### 7", True),
        ("#### 8", "#### 7", False),
        ("7", "It is 7. #### 7", False),
        (" seven ", "seven", True),
    ],
)
def test_answers_are_compared_after_the_hashes_where_both_have_them(written, expected, same):
    assert generation.same_answer(written, expected) is same


@pytest.mark.parametrize(
    ("written", "expected", "same"),
    [
        ("#### 1,200", "#### 1200", True),
        ("42.", "42", True),
        ("$42.00", "42", True),
        ("-3", "- 3", True),
        ("1,20", "120", False),
        ("1200 apples", "1200", False),
        ("42.5", "42", False),
        ("#### 7\n", "so #### 7", True),
        ("1e3", "1000", False),
        ("007", "7", True),
        ("", "0", False),
        ("\N{MINUS SIGN}5", "-5.0", True),
        ("$-5", "-$5", True),
        ("$42$", "42", True),
        ("1,200 €", "1200", True),
    ],
)
def test_numbers_are_compared_as_numbers(written, expected, same):
    assert generation.same_answer(written, expected) is same


@pytest.mark.parametrize(
    ("pattern", "written", "expected", "same"),
    [
        (r"answer is (\S+)", "First the answer is 3. No, the answer is 1,200.", "1200", True),
        (r"answer is (\S+)", "it is 1200", "1200", False),
        (r"-?[\d,.]*\d", "so 3 + 4 = 7 apples", "#### 7", True),
        (r"\\boxed\{(.*?)\}", r"thus \boxed{x+1}", r"\boxed{x+1}", True),
        (r"\(([A-D])\)", "either (A) or (B)", "(B)", True),
        (r"\(([A-D])\)", "either (B) or (A)", "(B)", False),
        (r"-?\d+", "thus \N{MINUS SIGN}5", "-5", True),
        (r"-?\d+", "thus 5", "\N{MINUS SIGN}5", False),
    ],
)
def test_answer_is_the_last_place_that_fits_the_pattern(pattern, written, expected, same):
    assert generation.same_answer(written, expected, pattern) is same


def test_pattern_that_cannot_be_read_is_refused():
    assert "task_type.answer_pattern" in TaskSpec(name="CAUSAL_LM", answer_pattern="(").problems()[0]


# --- plain text files ------------------------------------------------------------------------------------------------


def test_text_file_is_packed_into_blocks_that_hold_all_of_it(tmp_path):
    paragraphs = [f"Speaker {i}:\n" + "words and more words " * (i % 5) for i in range(200)]
    paragraphs[50] = "a very long line " * 50
    (tmp_path / "input.txt").write_text("\n\n".join(paragraphs), encoding="utf8")
    spec = DataSpec(source="text", path=str(tmp_path / "input.txt"), max_tokens=64)
    found = dataset.load(spec, {"text": "text"}, "CAUSAL_LM")
    blocks = [r["text"] for rows in found.splits.values() for r in rows]
    assert max(map(len, blocks)) <= 64 * 3 + 2
    assert sum(map(len, blocks)) / len(blocks) > 64 * 3 / 2
    assert sorted(w for b in blocks for w in b.split()) == sorted(w for p in paragraphs for w in p.split())

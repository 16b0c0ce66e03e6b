"""Bits a byte: what the same text costs, whatever tokens it is cut into; the rank of trials whose tokenizers differ."""

import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from support.studies import SMALL
from support.tokenizers import END, START, byte_level
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorasweep.cli import main
from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.study import answer, wording
from lorasweep.study.result import read_result
from lorasweep.study.study import Study
from lorasweep.tasks import token_cache
from lorasweep.tasks.causal_lm import CausalLM
from lorasweep.tasks.seq_2_seq_lm import Seq2SeqLM

TEXTS = ["the cat sat on the mat", "it left New York , 42 times", "größer als diese Katze war"]
ROWS = [{"prompt": f"{i} says", "completion": f" {TEXTS[i % 3]} and then it left"} for i in range(400)]


def single_bytes(folder: Path | None = None) -> transformers.PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are bytes."""
    letters = [START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token=START, eos_token=END, pad_token=END)
    if folder is not None:
        found.save_pretrained(folder)
    return found


def indifferent(folder: Path, tokenizer: transformers.PreTrainedTokenizerBase) -> Path:
    """Save a language model that gives each of its tokens the same chance, whatever is learned below its head."""
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 1e-4
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def expected(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Return bits a byte of texts and their end tokens where each token has the same chance."""
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    return tokens * math.log2(len(tokenizer)) / sum(len(text.encode()) for text in texts)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unlike")
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS), encoding="utf8")
    indifferent(folder / "bytes", single_bytes())
    indifferent(folder / "words", byte_level())
    with (folder / "said.txt").open("w") as said, redirect_stdout(said):
        assert swept(folder, "study=unlike") == 0
    return folder


def words(place: Path, models: str, *more: str) -> list[str]:
    data = ["task_type=causal_lm", "data.path=" + str(place / "train.jsonl"), "lora.target_modules=attention"]
    return [
        *data,
        *SMALL,
        "data.eval_fraction=0.2",
        "data.max_eval_samples=60",
        f"outputs={place}",
        "tracking=none",
        *more,
        models,
    ]


def swept(place: Path, *more: str) -> int:
    return main.main(["-m", *words(place, f"model.pretrained={place / 'bytes'},{place / 'words'}", *more)])


def test_unlike_tokenizers_are_ranked_by_what_the_text_costs(place):
    study = Study.open(place / "unlike")
    by_bytes, by_words = (read_result(study.trial_folder(n)) for n in (0, 1))
    assert study.meta.metric == by_words.metric.name == "bits_per_byte" and not study.meta.maximize
    assert by_bytes.metrics["loss"] < by_words.metrics["loss"], "a token is easier to guess where there are few"
    for result, tokenizer in ((by_bytes, single_bytes()), (by_words, byte_level())):
        texts = [ROWS[p]["completion"] for p in scored_rows(study, result.number)]
        assert result.metrics["bits_per_byte"] == pytest.approx(expected(tokenizer, texts), rel=1e-3)
    found = answer.answer(study)
    assert found.best.number == 1 and [c.number for c in found.worse] == [0]
    assert found.best.interval.holds(by_words.metrics["bits_per_byte"])
    assert "costs in bits a UTF-8 byte, whatever tokens it is cut into" in wording.text(found)


def scored_rows(study: Study, number: int) -> list[int]:
    """Return places in ROWS of as many rows of each text as the eval split has."""
    parts = study.scores(number)
    sizes = {len(row["completion"].encode()): i for i, row in enumerate(ROWS)}
    return [sizes[int(size)] for size in parts.second]


def test_first_screen_says_by_what_trials_are_ranked(place):
    said = (place / "said.txt").read_text()
    assert "the trials' tokenizers cut text into unlike tokens, so that loss does not compare" in said
    assert said.index("unlike tokens") < said.index("begins")


def test_like_tokenizers_are_ranked_by_the_loss(place, capsys):
    other = indifferent(place / "other", byte_level())
    assert main.main(["-m", *words(place, f"model.pretrained={place / 'words'},{other}", "study=like")]) == 0
    study = Study.open(place / "like")
    assert study.meta.metric == "loss" and "unlike tokens" not in capsys.readouterr().out
    assert read_result(study.trial_folder(0)).metrics["bits_per_byte"] > 0
    assert main.main(["add", str(study.folder), f"model.pretrained={place / 'bytes'}"]) == 1
    assert "cuts text into other tokens" in capsys.readouterr().err
    assert main.main(["add", str(place / "unlike"), "lora.r=4", f"model.pretrained={other}"]) == 0


@pytest.mark.parametrize("key", ["search.target=2.0", "search.margin=0.1", "search.direction=minimize"])
def test_keys_about_a_loss_a_token_are_refused_where_that_does_not_rank(place, capsys, key):
    assert swept(place, "study=refused", key) == 1
    assert f"{key.split('=')[0]}: is about loss" in (said := capsys.readouterr().err)
    assert "task_type.primary=bits_per_byte" in said and not (place / "refused").exists()


def bytes_of(records: list[dict], tokenizer, **data) -> list[int]:
    spec = DataSpec(**({"max_tokens": 100} | data))
    return [e.text_bytes for e in CausalLM(TaskSpec(name="CAUSAL_LM")).encode(records, tokenizer, spec)]


def test_bytes_are_those_of_the_text_that_is_learned():
    text = "größer than the cat"
    size, tokenizer = len(text.encode()), byte_level()
    begin = len(tokenizer.decode(tokenizer(text)["input_ids"][:1]).encode())
    assert bytes_of([{"prompt": "x", "completion": text}], tokenizer) == [size]
    assert bytes_of([{"text": text}], tokenizer) == [size - begin], "nothing predicts the first token"
    assert bytes_of([{"text": text}], byte_level(around=(START, ""))) == [size]
    assert bytes_of([{"text": "abcdefgh"}], single_bytes(), max_tokens=5) == [4], "the rest is cut"
    chat = [{"role": "user", "content": "how"}, {"role": "assistant", "content": "so it is"}]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|begin|>' + m['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|begin|>' }}{% endif %}"
    )
    assert bytes_of([{"messages": chat}], tokenizer) == [len("so it is")]


def test_bytes_of_targets_and_of_cut_ones():
    task, tokenizer = Seq2SeqLM(TaskSpec(name="SEQ_2_SEQ_LM")), single_bytes()
    rows = [{"source": "x", "target": "größe"}, {"source": "x", "target": "abcdefghij"}]
    found = task.encode(rows, tokenizer, DataSpec(max_tokens=50, max_target_tokens=8))
    assert [e.text_bytes for e in found] == [7, 8]


def test_kept_tokens_keep_their_bytes(tmp_path):
    task, tokenizer = CausalLM(TaskSpec(name="CAUSAL_LM")), byte_level()
    examples, facts = token_cache.encoded(task, {"train": ROWS[:9]}, tokenizer, DataSpec(max_tokens=100))
    assert token_cache.write(tmp_path / "kept", examples, facts, task.held)
    again = token_cache.read(tmp_path / "kept", task.held)[0]["train"]
    assert [e.text_bytes for e in again] == [len(r["completion"].encode()) for r in ROWS[:9]]
    assert [(e.row, e.supervised, list(e.target)) for e in again] == [
        (e.row, e.supervised, list(e.target)) for e in examples["train"]
    ]
    assert all(replace(e, text_bytes=0) != e for e in examples["train"])

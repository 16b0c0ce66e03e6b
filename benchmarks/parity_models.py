"""The tiny random models, their tokenizers and the data of parity.py.

Each tokenizer cuts text as its family's does, and puts the same around it.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers as hf
import torch
import transformers as T
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

WORDS = "the a red blue old new fast slow cat dog bird tree house river city road sees finds likes leaves under over"
PLACES = "York Delhi Lima Oslo Paris Rome Cairo Quito"
PAD, START, END, UNKNOWN, MASK = "<pad>", "<s>", "</s>", "<unk>", "<mask>"
WIDTH, LAYERS, HEADS = 16, 2, 2
SMALL_SD = 0.04
"""Of weights with which random models answer nearly the same to all texts."""
NO_DROPOUT = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "activation_dropout"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "summary_last_dropout", "dropout_rate"),
    *("classifier_dropout", "pooler_dropout", "embedding_dropout", "mlp_dropout", "layerdrop"),
)
"""Names that configs have for the shares of dropout."""


# --- tokenizers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How a family's tokenizer cuts text, what it puts around one text and two, and on which side it pads."""

    cut: str
    one: str
    two: str = ""
    side: str = "right"
    pads: bool = True
    """Whether it has a padding token."""
    types: bool = False
    """Whether it tells a first text's tokens from a second one's."""


KINDS = {
    "wordpiece": Kind("wordpiece", f"{START}:0 $A:0 {END}:0", f"{START}:0 $A:0 {END}:0 $B:1 {END}:1", types=True),
    "roberta": Kind("bytes", f"{START}:0 $A:0 {END}:0", f"{START}:0 $A:0 {END}:0 {END}:0 $B:0 {END}:0"),
    "deberta": Kind("unigram", f"{START}:0 $A:0 {END}:0", f"{START}:0 $A:0 {END}:0 $B:1 {END}:1", types=True),
    "xlnet": Kind(
        "unigram", f"$A:0 {END}:0 {START}:2", f"$A:0 {END}:0 $B:1 {END}:1 {START}:2", side="left", types=True
    ),
    "t5": Kind("unigram", f"$A:0 {END}:0", f"$A:0 {END}:0 $B:0 {END}:0"),
    "gpt2": Kind("bytes", "", pads=False),
    "llama": Kind("bytes", f"{START}:0 $A:0", f"{START}:0 $A:0 {START}:0 $B:0", pads=False),
    "qwen": Kind("bytes", ""),
}


def tokenizer(kind: str) -> T.PreTrainedTokenizerFast:
    """Return a family's tokenizer, trained on the words of the data."""
    how, special = KINDS[kind], [PAD, START, END, UNKNOWN, MASK]
    texts = [f"{WORDS} {PLACES}", f"{WORDS.title()} ? . Which place is it"] * 4
    match how.cut:
        case "wordpiece":
            made = hf.Tokenizer(models.WordPiece(unk_token=UNKNOWN))
            made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
            trainer: Any = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
        case "unigram":
            made = hf.Tokenizer(models.Unigram())
            made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
            trainer = trainers.UnigramTrainer(
                vocab_size=120, special_tokens=special, unk_token=UNKNOWN, show_progress=False
            )
        case _:
            made = hf.Tokenizer(models.BPE())
            made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "roberta")
            made.decoder = decoders.ByteLevel()
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(
                vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
            )
    made.train_from_iterator(texts, trainer)
    if how.one:
        known = [(t, made.token_to_id(t)) for t in (START, END)]
        made.post_processor = processors.TemplateProcessing(single=how.one, pair=how.two, special_tokens=known)
    names: dict[str, str] = {"eos_token": END, "unk_token": UNKNOWN}
    names |= {"pad_token": PAD} if how.pads else {}
    names |= {"bos_token": START} if kind in ("llama", "gpt2", "roberta") else {}
    names |= {"cls_token": START, "sep_token": END} if kind in ("wordpiece", "roberta", "deberta", "xlnet") else {}
    reads = ["input_ids", *(["token_type_ids"] if how.types else []), "attention_mask"]
    return T.PreTrainedTokenizerFast(
        tokenizer_object=made, padding_side=how.side, model_max_length=128, model_input_names=reads, **names
    )


# --- models ----------------------------------------------------------------------------------------------------------

_USUAL = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 32}
_DECODER = {**_USUAL, "num_key_value_heads": 1, "max_position_embeddings": 128}
_BART = {
    **{"d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "max_position_embeddings": 128},
    **{"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS},
    **{"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "decoder_start_token_id": 2, "forced_eos_token_id": None},
}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0}

ARCHITECTURES: dict[str, tuple[type, str, dict[str, Any]]] = {
    "BERT": (T.BertConfig, "wordpiece", _USUAL),
    "RoBERTa": (T.RobertaConfig, "roberta", {**_USUAL, "type_vocab_size": 1, "max_position_embeddings": 140}),
    "ModernBERT": (T.ModernBertConfig, "roberta", {**_USUAL, "cls_token_id": 1, "sep_token_id": 2}),
    "DeBERTa": (T.DebertaV2Config, "deberta", {**_USUAL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "XLNet": (T.XLNetConfig, "xlnet", {"d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": 32}),
    "GPT-2": (T.GPT2Config, "gpt2", {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}),
    "Llama": (T.LlamaConfig, "llama", _DECODER),
    "Llama, tied": (T.LlamaConfig, "llama", {**_DECODER, "tie_word_embeddings": True}),
    "Qwen2": (T.Qwen2Config, "qwen", _DECODER),
    "Qwen3": (T.Qwen3Config, "qwen", {**_DECODER, "head_dim": 8}),
    "Gemma": (T.GemmaConfig, "llama", {**_DECODER, "head_dim": 8}),
    "T5": (T.T5Config, "t5", _T5),
    "mT5": (T.MT5Config, "t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "BART": (T.BartConfig, "roberta", _BART),
    "Pegasus": (T.PegasusConfig, "t5", {**_BART, "decoder_start_token_id": 0}),
}
"""Config class, kind of tokenizer and sizes."""


def save_model(name: str, auto: str, folder: Path) -> Path:
    """Write a model without a head (a language model: with one) and its tokenizer, all from one seed."""
    config_class, kind, sizes = ARCHITECTURES[name]
    tokens = tokenizer(kind)
    ids = {"pad_token_id": tokens.pad_token_id, "eos_token_id": tokens.eos_token_id}
    config = config_class(**{**ids, "bos_token_id": 1, **sizes}, vocab_size=len(tokens))
    for key in NO_DROPOUT:
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)
    config.classifier_dropout = 0.0  # 0.1 where a config has no word on it
    torch.manual_seed(0)
    kind_of_model = auto if auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") else "AutoModel"
    model = getattr(T, kind_of_model).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # wide enough that answers differ
            if parameter.dim() > 1 and float(parameter.std()) < SMALL_SD:
                parameter.mul_(5)
    model.save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


# --- data ------------------------------------------------------------------------------------------------------------


def save_data(task: str, folder: Path, train: int, rest: int, tokens: T.PreTrainedTokenizerFast) -> None:
    """Write train, eval and test of a task. Contexts have as many tokens each: padding has a part in the loss that
    transformers takes of spans, and none in ours.
    """
    draw, length = random.Random(0), 0
    for split, rows in (("train", train), ("eval", rest), ("test", rest)):
        records: list[dict[str, Any]] = []
        while len(records) < rows:
            record = _record(task, len(records), draw)
            if task == "question_ans":
                found = len(tokens(record["question"], record["context"])["input_ids"])
                length = length or found
                if found != length:
                    continue
            records.append(record)
        if task == "token_cls":
            text = "\n\n".join("\n".join(map("\t".join, zip(*r.values(), strict=True))) for r in records) + "\n"
            (folder / f"{split}.conll").write_text(text)
        else:
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))


def _record(task: str, number: int, draw: random.Random) -> dict[str, Any]:
    def words(count: int) -> list[str]:
        return draw.choices(WORDS.split(), k=count)

    match task:
        case "seq_cls":
            return {"text": " ".join(words(draw.randint(3, 12))), "label": ["good", "bad", "none"][number % 3]}
        case "causal_lm":
            return {"prompt": " ".join(words(draw.randint(2, 8))), "completion": " ".join(words(draw.randint(1, 5)))}
        case "seq_2_seq_lm":
            return {"source": " ".join(words(draw.randint(2, 8))), "target": " ".join(words(draw.randint(1, 5)))}
        case "feature_extraction":
            return {"anchor": f"{' '.join(words(draw.randint(2, 9)))} {number}", "positive": " ".join(words(7))}
        case "question_ans":
            context = words(12)
            at = draw.randrange(12)
            start = len(" ".join(context[:at])) + (at > 0)
            answers = {"text": [context[at]], "answer_start": [start]}
            return {"question": "Which place is it ?", "context": " ".join(context), "answers": answers}
    tokens, tags = words(draw.randint(3, 10)), list[str]()
    tags = ["O"] * len(tokens)
    at = draw.randrange(len(tokens) - 1)
    tokens[at : at + 2] = draw.choices(PLACES.split(), k=2)
    tags[at : at + 2] = ["B-LOC", "I-LOC" if number % 2 else "O"]
    return {"tokens": tokens, "tags": tags}


def records_of(task: str, folder: Path, split: str) -> Sequence[dict[str, Any]]:
    """Return the records of a split, as they were written."""
    if task != "token_cls":
        return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
    sentences = (folder / f"{split}.conll").read_text().strip().split("\n\n")
    rows = [[line.split("\t") for line in s.split("\n")] for s in sentences]
    return [{"tokens": [w for w, _ in row], "tags": [t for _, t in row]} for row in rows]

"""Tokenizers trained on a few words, of the kinds that model families have."""

from collections.abc import Sequence
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

WORDS = "the cat sat on the mat in New York and then it left , 42 times"
START, END = "<|begin|>", "<|end|>"
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    pre: str = "gpt2", around: Sequence[str] = ("", ""), folder: Path | None = None
) -> transformers.PreTrainedTokenizerBase:
    """Return a byte-level BPE tokenizer. `pre` is how it cuts text: as GPT-2, Llama 3 or SmolLM2 does; `around` is what
    its post-processor puts before and after a text.
    """
    from tokenizers import Regex

    kinds = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "smollm2": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    }
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = kinds[pre], decoders.ByteLevel()
    special = [START, END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [WORDS] * 5,
        trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    before, after = around
    if before or after:
        single = f"{before + ':0 ' if before else ''}$A:0{' ' + after + ':0' if after else ''}"
        known = [(t, made.token_to_id(t)) for t in {before, after} - {""}]
        template = processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=known)
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=START, eos_token=END, pad_token=END, model_max_length=256
    )
    if folder is not None:
        found.save_pretrained(folder)
    return found

"""Generated text: greedy decoding of a batch, and its scores against references.

Shapes: B rows, T tokens.
"""

import functools
import re
from collections.abc import Sequence
from decimal import Decimal
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lorasweep.config.spec import TaskSpec
from lorasweep.tasks.metric import Metric, Pairs, Prediction, bleu, chrf, ratio

SPACELESS = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""Characters of scripts without spaces between words (Chinese, Japanese): each counts as a word."""

HASHES = r"(?s)#### (.*?)(?=#### |\Z)"
"""What stands after GSM8K's mark of an answer."""

NUMBER = re.compile(
    r"[$€£¥₹]?\s*(?P<sign>[-+−]?)\s*[$€£¥₹]?\s*"  # noqa: RUF001
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)\s*[%$€£¥₹]?\.?",
    re.ASCII,
)
"""A number, maybe with a currency before or after it, commas between thousands and a full stop after it."""

NO_TEXTS = "give task_type.generate=true, so that the model writes answers"
"""What is said where a metric is to look at texts and none are written."""

WRITTEN = "text"
"""Key of predictions whose answer was generated; other rows have no part in the metrics of texts."""


def chosen(count: int, limit: int | None) -> set[int]:
    """Return at most `limit` of the indices below `count`, evenly spread; all of them for None."""
    if limit is None or count <= limit:
        return set(range(count))
    return {i * count // limit for i in range(limit)}


def greedy(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, tokenizer: Any, max_new_tokens: int, stop: Sequence[int] = ()
) -> list[str]:
    """Return what the model writes after each prompt (after each source, for an encoder-decoder), stripped.

    Prompts of a decoder-only model must be padded on the left. A text ends at the model's or the tokenizer's end token
    or at one of `stop`.
    """
    ends = model.generation_config.eos_token_id
    found = {*(ends if isinstance(ends, list | tuple) else [ends]), tokenizer.eos_token_id, *stop} - {None}
    written_BT = model.generate(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(found) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    if not model.config.is_encoder_decoder:
        written_BT = written_BT[:, ids_BT.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(written_BT, skip_special_tokens=True)]


def padded_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask, [B, T] each."""
    length = max(map(len, rows))
    ids_BT = torch.full((len(rows), length), pad_id)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids_BT[i, length - len(row) :] = torch.tensor(row)
        mask_BT[i, length - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


def rouge_l(text: str, references: Sequence[str]) -> float:
    """Return ROUGE-L of a text (F, the best reference), from 0 to 1."""
    return rouge("L", text, references)


def rouge(kind: str, text: str, references: Sequence[str]) -> float:
    """Return ROUGE-1, ROUGE-2 or ROUGE-L of a text (F, the best reference), from 0 to 1."""
    from torchmetrics.functional.text.rouge import rouge_score

    found = rouge_score(
        [_spaced(text)],
        [[_spaced(r) for r in references]],
        accumulate="best",
        rouge_keys=f"rouge{kind}",
        normalizer=str.lower,
        tokenizer=_words,
    )
    return float(found[f"rouge{kind}_fmeasure"])


def counts(metric: str, text: str, references: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return what one text adds to the counts that bleu or chrf is made of.

    bleu: matching n-grams of order 1 to 4; the text's n-grams of each order, its length, the closest reference's.
    chrf: matching n-grams of 1 to 6 characters; the text's of each order, then the best reference's.
    """
    from torchmetrics.text import CHRFScore, SacreBLEUScore

    if metric == "bleu":
        bleu = SacreBLEUScore(tokenize="13a")
        bleu.update([_spaced(text)], [[_spaced(r) for r in references]])
        state = bleu.metric_state
        return _ints(state["numerator"]), _ints(*(state[k] for k in ("denominator", "preds_len", "target_len")))
    chrf = CHRFScore(n_word_order=0)
    chrf.update([text], [list(references)])
    state = chrf.metric_state

    def counts(kind: str) -> list[Any]:
        return [state[f"total_{kind}_char_{n}_grams"] for n in range(1, 7)]

    return _ints(*counts("matching")), _ints(*counts("preds"), *counts("target"))


def _ints(*found: Any) -> list[int]:
    return [int(v) for v in chain.from_iterable(part.reshape(-1).tolist() for part in found)]


def measures() -> tuple[Metric, ...]:
    """Return the metrics of texts against references: ROUGE-L, BLEU (sacrebleu's 13a tokens) and chrF."""
    return (
        Metric("rouge_l", _rouge_l, ratio),
        Metric("bleu", functools.partial(_counts, "bleu"), bleu),
        Metric("chrf", functools.partial(_counts, "chrf"), chrf),
    )


def ready(spec: TaskSpec) -> tuple[Metric, ...]:
    """Return the metrics of generated text that task_type.metrics may ask for."""

    def found(predictions: Sequence[Prediction]) -> Pairs:
        pattern = re.compile(spec.match_pattern or "")
        return {p["row"]: (pattern.search(p["text"]) is not None, 1) for p in predictions if WRITTEN in p}

    if not spec.generate:
        return ()
    rouges = [Metric(f"rouge_{n}", functools.partial(_rouge, str(n)), ratio) for n in (1, 2)]
    return (*rouges, *measures(), EXACT_MATCH, Metric("pattern_match", found, ratio))


def _rouge(kind: str, predictions: Sequence[Prediction]) -> Pairs:
    return {p["row"]: (rouge(kind, p["text"], p["references"]), 1) for p in predictions if WRITTEN in p}


def _rouge_l(predictions: Sequence[Prediction]) -> Pairs:
    return {p["row"]: (rouge_l(p["text"], p["references"]), 1) for p in predictions if WRITTEN in p}


def _counts(metric: str, predictions: Sequence[Prediction]) -> Pairs:
    return {p["row"]: counts(metric, p["text"], p["references"]) for p in predictions if WRITTEN in p}


EXACT_MATCH = Metric(
    "exact_match", lambda predictions: {p["row"]: (p["right"], 1) for p in predictions if WRITTEN in p}, ratio
)


def answer(text: str, pattern: str) -> str:
    """Return the last place of a text that fits the pattern, its first group where it has one; else all of the text."""
    found = list(re.finditer(pattern, text))
    if not found:
        return text.strip()
    return (found[-1][1] if found[-1].re.groups else found[-1][0] or "").strip()


def same_answer(written: str, expected: str, pattern: str | None = None) -> bool:
    """Tell whether two answers agree, as texts or as numbers: what the pattern finds in each; without one, what stands
    after `#### ` (GSM8K) where both have it, else the whole texts.
    """
    written, expected = (text.replace("\N{MINUS SIGN}", "-") for text in (written, expected))
    if pattern is None and "#### " in written and "#### " in expected:
        pattern = HASHES
    pair = (
        (written.strip(), expected.strip())
        if pattern is None
        else (answer(written, pattern), answer(expected, pattern))
    )
    if pair[0] == pair[1]:
        return True
    first, second = map(number, pair)
    return first is not None and first == second


def number(text: str) -> Decimal | None:
    """Return the number that a text is and nothing else: 1,200 and $1200. are 1200, as GSM8K's scores have it."""
    found = NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    return Decimal(found["sign"].replace("\N{MINUS SIGN}", "-") + found["digits"].replace(",", ""))


def _spaced(text: str) -> str:
    return SPACELESS.sub(r" \1 ", text)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)

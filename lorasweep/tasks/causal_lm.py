"""CAUSAL_LM: plain text, a prompt with the completion that is learned, or a chat; loss in nats a token first.

Shapes: B rows, T tokens, N supervised positions, D hidden, V words.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lorasweep.config.spec import DataSpec, TaskSpec
from lorasweep.data.dataset import Data, Record
from lorasweep.tasks import generation, special_tokens
from lorasweep.tasks.chat_template import Turns, chats
from lorasweep.tasks.lm_head import Head
from lorasweep.tasks.task import IGNORE, Batch, Example, Prediction, Task, mean_loss
from lorasweep.tasks.too_long import Cutter


class CausalLM(Task):
    name = "CAUSAL_LM"
    auto_class = "AutoModelForCausalLM"
    metric_names: tuple[str, ...] = ("loss", "perplexity", "token_accuracy")

    def __init__(self, spec: TaskSpec) -> None:
        super().__init__(spec)
        if spec.generate:
            self.metric_names = (*self.metric_names, "exact_match")
        self.tokenizer: Any = None
        self.stop: tuple[int, ...] = ()
        """Token that ends an assistant's turn, beside the end token."""
        self.head = Head()

    def columns(self, spec: DataSpec) -> dict[str, str]:
        if spec.messages_column:
            return {"messages": spec.messages_column}
        if spec.prompt_column and spec.completion_column:
            return {"prompt": spec.prompt_column, "completion": spec.completion_column}
        return {"text": spec.text_column}

    def fit(self, data: Data) -> list[str]:
        """Learn nothing; return a problem where there is no answer to generate."""
        if self.spec.generate and "text" in data.splits["train"][0]:
            return [
                "task_type.generate: plain text asks for no answer; give data.prompt_column and "
                "data.completion_column, or data.messages_column"
            ]
        return []

    def encode(self, records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Example]:
        """Supervise the completion and the end token that follows it, or the assistant's turns of a chat; of plain
        text, every token but the first. Raises ConfigError where the chat template does not fit.
        """
        self.tokenizer = tokenizer
        if "messages" in records[0]:
            turns, prompts, notes = chats(tokenizer, records, spec.bad_rows)
            special = [i for i in turns[0][1][-1][1] if i in tokenizer.all_special_ids]
            self.stop = tuple(special[-1:])
            self.notes += notes
            answers = [str([m for m in r["messages"] if m["role"] == "assistant"][-1]["content"]) for r in records]
        else:
            turns = list(enumerate(_one_turn(records, tokenizer, spec)))
            answers = [str(r.get("completion", "")) for r in records]
            prompts = [parts[-1][0] for _, parts in turns]
        last = {row: place for place, (row, _) in enumerate(turns)}
        cutter = Cutter(spec, special_tokens.around(tokenizer)[0])
        examples = []
        for place, (row, parts) in enumerate(turns):
            fitted = cutter.fit(row, parts)
            if fitted is None:
                continue
            ids, labels = fitted
            supervised = sum(label != IGNORE for label in labels[1:])
            if supervised:
                asked = self.spec.generate and last[row] == place and prompts[place]
                info = (cutter.prompt(prompts[place]), answers[row]) if asked else None
                inputs = {"input_ids": ids}
                examples.append(Example(row=row, inputs=inputs, target=labels, supervised=supervised, info=info))
        self.notes += cutter.notes(records)
        return self._some_asked(examples)

    def _some_asked(self, examples: list[Example]) -> list[Example]:
        """Return the examples, the prompts of only some of them to be answered by generation."""
        asked = [e.row for e in examples if e.info]
        chosen = {asked[i] for i in generation.chosen(len(asked), self.spec.generate_samples)}
        return [e if e.info is None or e.row in chosen else replace(e, info=None) for e in examples]

    def labels(self, examples: Sequence[Example], length: int) -> Tensor:
        table = torch.full((len(examples), length), IGNORE)
        for i, e in enumerate(examples):
            table[i, : len(e.target)] = torch.tensor(e.target)
        return table

    def row_losses(self, model: Any, batch: Batch) -> Tensor:
        return row_sums(batch, *self._token_losses(model, batch)[:2])

    def predict(self, model: Any, batch: Batch) -> list[Prediction]:
        found = token_predictions(batch, *self._token_losses(model, batch))
        asked = [(p, *info) for p, info in zip(found, batch.infos, strict=True) if info]
        if asked:
            prompts = [prompt for _, prompt, _ in asked]
            ids_BT, mask_BT = generation.padded_left(prompts, self.tokenizer.pad_token_id, batch.labels.device)
            texts = generation.greedy(model, ids_BT, mask_BT, self.tokenizer, self.spec.max_new_tokens, self.stop)
            for (p, _, answer), text in zip(asked, texts, strict=True):
                right = generation.same_answer(text, answer, self.spec.answer_pattern)
                p |= {"text": text, "right": right}
        return found

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        values = token_metrics(predictions)
        if self.spec.generate:
            rights = [p["right"] for p in predictions if "text" in p]
            values["exact_match"] = sum(rights) / len(rights) if rights else math.nan
        return values

    def readable(self, record: Record, prediction: Prediction) -> str:
        if "text" in prediction:
            return prediction["text"]
        return readable_tokens(prediction)

    def _token_losses(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, row and hit of each supervised position, [N] each. Position t is scored against label t+1."""
        targets_BT = batch.labels.roll(-1, 1)
        targets_BT[:, -1] = IGNORE
        return self.head.losses(model, batch.inputs, targets_BT)


def row_sums(batch: Batch, losses_N: Tensor, where: Tensor) -> Tensor:
    """Return the summed loss of each row, [B]; `where` holds the row of each supervised token."""
    return losses_N.new_zeros(len(batch.rows)).index_add(0, where, losses_N)


def token_predictions(batch: Batch, losses_N: Tensor, where: Tensor, correct_N: Tensor) -> list[Prediction]:
    """Return loss, number of supervised tokens and of right ones, a row."""
    sums = losses_N.new_zeros(3, len(batch.rows))
    sums.index_add_(1, where, torch.stack([losses_N, torch.ones_like(losses_N), correct_N.to(losses_N)]))
    losses, counts, correct = sums.tolist()
    return [
        {"row": r, "loss": loss, "supervised": int(count), "correct": int(right)}
        for r, loss, count, right in zip(batch.rows, losses, counts, correct, strict=True)
    ]


def token_metrics(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Return loss, perplexity and accuracy over all supervised tokens."""
    loss = mean_loss(predictions)
    right, tokens = (sum(p[k] for p in predictions) for k in ("correct", "supervised"))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700)), "token_accuracy": right / tokens}


def readable_tokens(prediction: Prediction) -> str:
    per_token = prediction["loss"] / prediction["supervised"]
    return f"{prediction['correct']} of {prediction['supervised']} tokens right, {per_token:.3f} nats a token"


def _one_turn(records: Sequence[Record], tokenizer: Any, spec: DataSpec) -> list[Turns]:
    """Return a single part for each record: prompt and completion, or nothing and the plain text."""
    start, end = special_tokens.around(tokenizer)[0], special_tokens.ends(tokenizer)
    if "prompt" in records[0]:
        heads = _plain(tokenizer, [str(r["prompt"]) + spec.prompt_suffix for r in records])
        tails = _plain(tokenizer, [str(r["completion"]) for r in records])
    else:
        heads = [[]] * len(records)
        tails = _plain(tokenizer, [str(r["text"]) for r in records])
    if "prompt" not in records[0]:
        tails = [tail[len(start) :] if start and tail[: len(start)] == start else tail for tail in tails]
    return [
        [(special_tokens.begun(head, start), special_tokens.ended(tail, end))]
        for head, tail in zip(heads, tails, strict=True)
    ]


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]

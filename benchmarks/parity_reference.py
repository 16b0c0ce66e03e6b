"""Each task as a user of plain transformers and peft writes it, with nothing of lorasweep: parity.py's reference.

Tokens come from the tokenizer, batches from transformers' own collators, losses from its models (but for vectors, where
it has none), metrics from scikit-learn, seqeval and torchmetrics. Shapes: B rows, T tokens, D hidden.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers as T
from peft import PeftModel
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    label_ranking_average_precision_score,
    matthews_corrcoef,
    top_k_accuracy_score,
)
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from torch.utils.data import DataLoader

Record = dict[str, Any]
IGNORE = -100
NEW_TOKENS = 6
TEMPERATURE = 0.05
LONGEST_ANSWER = 30


@dataclass
class Reference(ABC):
    tokenizer: Any
    train: Sequence[Record]
    eval: Sequence[Record]
    auto: ClassVar[str]

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {}

    @abstractmethod
    def features(self, record: Record) -> dict[str, Any]:
        """Return the model's inputs for one record, its labels among them."""

    @abstractmethod
    def collator(self, model: Any) -> Any: ...

    @abstractmethod
    def metrics(self, model: Any) -> dict[str, float]:
        """Return the metrics on eval, by others' definitions of them."""

    @abstractmethod
    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        """Return how far answers to eval are from a pipeline's: a number's largest difference; 1 for other words."""

    def fields(self, record: Record) -> Record:
        """Return what of a record is asked."""
        return {k: v for k, v in record.items() if k != "label"}

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Return the loss where the model does not bring it."""
        return None

    def load(self, folder: Path) -> Any:
        """Return the model in a folder, in double precision."""
        model = getattr(T, self.auto).from_pretrained(folder, **self.model_kwargs)
        model.config.pad_token_id = self.tokenizer.pad_token_id
        return model.double().eval()

    def adapted(self, base: Path, adapter: Path, trains: bool = False) -> Any:
        """Return the base with an adapter, in double precision."""
        return PeftModel.from_pretrained(self.load(base), adapter, is_trainable=trains).double().eval()

    def batch(self, model: Any, records: Sequence[Record]) -> dict[str, Tensor]:
        return dict(self.collator(model)([self.features(r) for r in records]))

    def pipeline(self, name: str, model: Any) -> Any:
        return T.pipeline(name, model=model, tokenizer=self.tokenizer)

    @torch.no_grad()
    def outputs(self, model: Any) -> list[list[Tensor]]:
        """Return what a model gives for each row of eval by itself."""
        found = [model(**self.batch(model, [record])) for record in self.eval]
        names = ("logits", "start_logits", "end_logits", "last_hidden_state")
        return [[getattr(out, n) for n in names if getattr(out, n, None) is not None] for out in found]

    def losses(self, model: Any, order: Sequence[int], arguments: T.TrainingArguments) -> list[float]:
        """Train with transformers' Trainer on these rows of train, in this order; return the loss of each step."""
        features = [self.features(self.train[row]) for row in order]
        recorder = Recorder(reference=self, features=features, model=model, args=arguments)
        recorder.train()
        return recorder.losses


class Recorder(T.Trainer):
    """A Trainer that keeps the order of its rows, and the loss of each step."""

    def __init__(self, reference: Reference, features: Sequence[dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reference, self.features = reference, features
        self.losses: list[float] = []

    def get_train_dataloader(self) -> DataLoader:
        size, collate = self.args.per_device_train_batch_size, self.reference.collator(self.model)
        return DataLoader(self.features, batch_size=size, shuffle=False, collate_fn=collate)  # type: ignore[arg-type]

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        found = self.reference.loss(model, inputs)
        return super().compute_loss(model, inputs, *args, **kwargs) if found is None else found

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


# --- one answer a text -----------------------------------------------------------------------------------------------


@dataclass
class SeqCls(Reference):
    auto = "AutoModelForSequenceClassification"

    @property
    def classes(self) -> list[str]:
        return sorted({r["label"] for r in self.train})

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.classes), "id2label": dict(enumerate(self.classes))}

    def features(self, record: Record) -> dict[str, Any]:
        return {**self.tokenizer(record["text"]), "labels": self.classes.index(record["label"])}

    def collator(self, model: Any) -> Any:
        return T.DataCollatorWithPadding(self.tokenizer)

    @torch.no_grad()
    def metrics(self, model: Any) -> dict[str, float]:
        batch = self.batch(model, self.eval)
        out = model(**batch)
        true, found = batch["labels"], out.logits.argmax(-1)
        return {
            "accuracy": accuracy_score(true, found),
            "macro_f1": f1_score(true, found, average="macro"),
            "mcc": matthews_corrcoef(true, found),
            "loss": float(cross_entropy(out.logits, true)),
        }

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        found = self.pipeline("text-classification", model)([r["text"] for r in self.eval])
        pairs = zip(found, answers, strict=True)
        return max(abs(f["score"] - a["probability"]) if f["label"] == a["label"] else 1.0 for f, a in pairs)


@dataclass
class FeatureExtraction(Reference):
    auto = "AutoModel"

    def features(self, record: Record) -> dict[str, Any]:
        return {name: self.tokenizer(record[name]) for name in ("anchor", "positive")}

    def collator(self, model: Any) -> Any:
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            pad = T.DataCollatorWithPadding(self.tokenizer)
            return {name: dict(pad([row[name] for row in rows])) for name in rows[0]}

        return collate

    def outputs(self, model: Any) -> list[list[Tensor]]:
        return [[v_1D] for v_1D in self._vectors(model, self.batch(model, self.eval)["anchor"]).split(1)]

    def loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Each anchor finds its positive among the batch's: sentence-transformers' MultipleNegativesRankingLoss."""
        anchors_BD, positives_BD = (self._vectors(model, inputs[name]) for name in ("anchor", "positive"))
        return cross_entropy(anchors_BD @ positives_BD.T / TEMPERATURE, torch.arange(len(anchors_BD)))

    def _vectors(self, model: Any, inputs: Any) -> Tensor:
        """Return the mean over the tokens that are no padding, of length 1."""
        mask_BT1 = inputs["attention_mask"][:, :, None]
        sums_BD = (model(**inputs).last_hidden_state * mask_BT1).sum(1)
        return normalize(sums_BD / mask_BT1.sum(1), dim=-1)

    @torch.no_grad()
    def metrics(self, model: Any) -> dict[str, float]:
        batch = self.batch(model, self.eval)
        anchors_BD, positives_BD = (self._vectors(model, batch[name]) for name in ("anchor", "positive"))
        cosines_BB, count = (anchors_BD @ positives_BD.T).numpy(), len(anchors_BD)
        return {
            "recall_at_1": top_k_accuracy_score(range(count), cosines_BB, k=1),
            "recall_at_10": top_k_accuracy_score(range(count), cosines_BB, k=10),
            "mrr": label_ranking_average_precision_score(torch.eye(count).numpy(), cosines_BB),
            "loss": float(self.loss(model, batch)),
        }

    def fields(self, record: Record) -> Record:
        return {"anchor": record["anchor"]}

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        found = self.pipeline("feature-extraction", model)([r["anchor"] for r in self.eval])
        vectors = [normalize(torch.tensor(states, dtype=torch.float64)[0].mean(0), dim=-1) for states in found]
        return max(float((v - torch.tensor(a["embedding"])).abs().max()) for v, a in zip(vectors, answers, strict=True))


# --- an answer a token -----------------------------------------------------------------------------------------------


@dataclass
class TokenCls(Reference):
    auto = "AutoModelForTokenClassification"

    @property
    def classes(self) -> list[str]:
        return sorted({tag for r in self.train for tag in r["tags"]})

    @property
    def model_kwargs(self) -> dict[str, Any]:
        return {"num_labels": len(self.classes), "id2label": dict(enumerate(self.classes))}

    def features(self, record: Record) -> dict[str, Any]:
        """A word's tag stands at its first token, as in transformers' own example of token classification; byte-level
        tokenizers read the words in running text, where a space by itself is no token of a word.
        """
        if "ByteLevel" not in str(self.tokenizer.backend_tokenizer.pre_tokenizer):
            found = self.tokenizer(record["tokens"], is_split_into_words=True)
            words = found.word_ids()
            first = [word is not None and word not in words[:t] for t, word in enumerate(words)]
            tags = [record["tags"][word] if begins else None for word, begins in zip(words, first, strict=True)]
            return {**found, "labels": [IGNORE if tag is None else self.classes.index(tag) for tag in tags]}
        text, labels = " ".join(record["tokens"]), list[int]()
        found = self.tokenizer(text, return_offsets_mapping=True)
        starts = _starts(record["tokens"])
        waiting = dict(zip(starts, record["tags"], strict=True))
        for first, last in found.pop("offset_mapping"):
            start = first + len(text[first:last]) - len(text[first:last].lstrip())
            tag = waiting.pop(start, None) if last > start else None
            labels.append(IGNORE if tag is None else self.classes.index(tag))
        return {**found, "labels": labels}

    def collator(self, model: Any) -> Any:
        return T.DataCollatorForTokenClassification(self.tokenizer)

    @torch.no_grad()
    def metrics(self, model: Any) -> dict[str, float]:
        from seqeval.metrics import f1_score as entity_f1
        from seqeval.metrics import precision_score, recall_score
        from seqeval.scheme import IOB2

        batch = self.batch(model, self.eval)
        out, labels_BT = model(**batch), batch["labels"]
        true, found = list[list[str]](), list[list[str]]()
        for labels, best in zip(labels_BT.tolist(), out.logits.argmax(-1).tolist(), strict=True):
            places = [t for t, label in enumerate(labels) if label != IGNORE]
            true.append([self.classes[labels[t]] for t in places])
            found.append([self.classes[best[t]] for t in places])
        strict: dict[str, Any] = {"mode": "strict", "scheme": IOB2, "zero_division": 0}
        return {
            "f1": entity_f1(true, found, **strict),
            "precision": precision_score(true, found, **strict),
            "recall": recall_score(true, found, **strict),
            "accuracy": accuracy_score([*chain(*true)], [*chain(*found)]),
            "loss": float(out.loss),
        }

    def fields(self, record: Record) -> Record:
        return {"tokens": record["tokens"]}

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        named = self.pipeline("token-classification", model)
        for record, answer in zip(self.eval, answers, strict=True):
            text = " ".join(record["tokens"])
            found = named(text, ignore_labels=[])
            tags: dict[int, str] = {}
            for part in found:
                piece = text[part["start"] : part["end"]]
                tags.setdefault(part["start"] + len(piece) - len(piece.lstrip()), part["entity"])
            if [tags.get(start) for start in _starts(record["tokens"])] != answer["tags"]:
                return 1.0
        return 0.0


def _starts(words: Sequence[str]) -> list[int]:
    """Return where each word begins in the text."""
    return [len(" ".join(words[:i])) + (i > 0) for i in range(len(words))]


@dataclass
class QuestionAns(Reference):
    auto = "AutoModelForQuestionAnswering"

    def features(self, record: Record) -> dict[str, Any]:
        found, (text,), (start,) = self._read(record), record["answers"]["text"], record["answers"]["answer_start"]
        places = self._places(record)
        inside = [t for t, place in enumerate(places) if place and place[0] < start + len(text) and place[1] > start]
        return {**found, "start_positions": inside[0], "end_positions": inside[-1]}

    def _read(self, record: Record, **kwargs: Any) -> Any:
        return self.tokenizer(record["question"], record["context"], **kwargs)

    def _places(self, record: Record) -> list[tuple[int, int] | None]:
        """Return where each token lies in the context, None for one outside it."""
        found = self._read(record, return_offsets_mapping=True)
        return [
            place if part == 1 and place[1] > place[0] else None
            for place, part in zip(found["offset_mapping"], found.sequence_ids(0), strict=True)
        ]

    def collator(self, model: Any) -> Any:
        return T.DataCollatorWithPadding(self.tokenizer)

    @torch.no_grad()
    def _answers(self, model: Any) -> list[str]:
        """Return the best span of each context."""
        answers = []
        for record in self.eval:
            places, out = self._places(record), model(**self._read(record, return_tensors="pt"))
            starts, ends = out.start_logits[0].tolist(), out.end_logits[0].tolist()
            inside = [t for t, place in enumerate(places) if place]
            spans = [(i, j) for i in inside for j in inside if i <= j < i + LONGEST_ANSWER]
            first, last = max(spans, key=lambda span: starts[span[0]] + ends[span[1]])
            answers.append(record["context"][places[first][0] : places[last][1]].strip())  # type: ignore[index]
        return answers

    @torch.no_grad()
    def metrics(self, model: Any) -> dict[str, float]:
        from torchmetrics.functional.text import squad

        rows = list(enumerate(zip(self._answers(model), self.eval, strict=True)))
        found = squad(
            [{"prediction_text": text, "id": str(i)} for i, (text, _) in rows],
            [{"answers": record["answers"], "id": str(i)} for i, (_, record) in rows],
        )
        loss = float(model(**self.batch(model, self.eval)).loss)
        return {"f1": float(found["f1"]) / 100, "exact_match": float(found["exact_match"]) / 100, "loss": loss}

    def fields(self, record: Record) -> Record:
        return {name: record[name] for name in ("question", "context")}

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        """transformers has no pipeline for questions any more: the model and the tokenizer answer."""
        return float(self._answers(model) != [a["answer"] for a in answers])


# --- text ------------------------------------------------------------------------------------------------------------


@dataclass
class LanguageModel(Reference):
    learned: ClassVar[str]
    """Field whose text is learned."""

    def collator(self, model: Any) -> Any:
        return T.DataCollatorForSeq2Seq(self.tokenizer, model=model)

    @torch.no_grad()
    def metrics(self, model: Any) -> dict[str, float]:
        from torchmetrics.functional.text import perplexity

        batch = self.batch(model, self.eval)
        out = model(**batch)
        logits_BTV, labels_BT = self._aligned(out.logits, batch["labels"])
        kept = labels_BT != IGNORE
        ppl = float(perplexity(logits_BTV, labels_BT, ignore_index=IGNORE))
        right = accuracy_score(labels_BT[kept], logits_BTV.argmax(-1)[kept])
        text_bytes = sum(len(record[self.learned].encode()) for record in self.eval)
        bits = float(out.loss) * int(kept.sum()) / math.log(2) / text_bytes
        return {"loss": float(out.loss), "perplexity": ppl, "token_accuracy": right, "bits_per_byte": bits}

    def _aligned(self, logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the labels that they are for."""
        return logits_BTV, labels_BT


@dataclass
class CausalLM(LanguageModel):
    auto = "AutoModelForCausalLM"
    learned = "completion"

    def features(self, record: Record) -> dict[str, Any]:
        prompt = self.tokenizer(record["prompt"] + "\n")["input_ids"]
        answer = self.tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        answer = [*answer, self.tokenizer.eos_token_id]
        ids = prompt + answer
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORE] * len(prompt) + answer,
        }

    def _aligned(self, logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
        return logits_BTV[:, :-1], labels_BT[:, 1:]

    def fields(self, record: Record) -> Record:
        return {"prompt": record["prompt"]}

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        write = self.pipeline("text-generation", model)
        more: dict[str, Any] = {"return_full_text": False, "do_sample": False, "max_new_tokens": NEW_TOKENS}
        found = [write(f"{r['prompt']}\n", **more)[0]["generated_text"].strip() for r in self.eval]
        return float(found != [a["text"] for a in answers])


@dataclass
class Seq2SeqLM(LanguageModel):
    auto = "AutoModelForSeq2SeqLM"
    learned = "target"

    def features(self, record: Record) -> dict[str, Any]:
        return {
            **self.tokenizer(record["source"]),
            "labels": self.tokenizer(text_target=record["target"])["input_ids"],
        }

    def _written(self, model: Any) -> list[str]:
        out = []
        for record in self.eval:
            inputs = self.tokenizer(record["source"], return_tensors="pt")
            written = model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS)
            out.append(self.tokenizer.decode(written[0], skip_special_tokens=True).strip())
        return out

    def metrics(self, model: Any) -> dict[str, float]:
        from torchmetrics.functional.text import chrf_score, rouge_score, sacre_bleu_score

        texts, true = self._written(model), [r["target"] for r in self.eval]
        several = [[t] for t in true]
        return super().metrics(model) | {
            "rouge_l": float(rouge_score(texts, true, rouge_keys="rougeL")["rougeL_fmeasure"]),
            "bleu": float(sacre_bleu_score(texts, several)),
            "chrf": float(chrf_score(texts, several, n_word_order=0)),
        }

    def fields(self, record: Record) -> Record:
        return {"source": record["source"]}

    def apart(self, model: Any, answers: Sequence[dict[str, Any]]) -> float:
        """transformers has no pipeline from text to text any more: the model and the tokenizer answer."""
        return float(self._written(model) != [a["text"] for a in answers])


REFERENCES: dict[str, type[Reference]] = {
    "seq_cls": SeqCls,
    "token_cls": TokenCls,
    "question_ans": QuestionAns,
    "causal_lm": CausalLM,
    "seq_2_seq_lm": Seq2SeqLM,
    "feature_extraction": FeatureExtraction,
}

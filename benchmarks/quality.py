"""One row a task on real data with a real pretrained model, each against a floor it must reach.

    python benchmarks/quality.py --data FOLDER banking77 gsm8k

FOLDER holds one folder a data set. Prints a table row a task: the test score of one trial, the score without training,
and the floor; exits with 1 where one is missed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.training import evaluation, workload

SOURCE_MATTERS = 0.1


@dataclass(frozen=True)
class Row:
    overrides: list[str]
    """FOLDER stands for the data folder."""
    metric: str
    floor: Callable[[dict[str, float]], tuple[float, bool]]
    """Of the untrained scores: the limit, and whether the test score must lie above it."""
    shuffle: bool = False
    """Also score the test split with shuffled sources: the loss must be SOURCE_MATTERS nats higher."""
    probe: bool = False
    """Also fit a logistic regression on the frozen mean-pooled embeddings of the same rows; it must be beaten."""


ROWS = {
    "banking77": Row(
        [
            "data=csv",
            "data.path=FOLDER/banking77",
            "data.label_column=category",
            "data.test_split=test",
            "data.eval_fraction=0.05",
            "data.max_tokens=64",
            "model.pooling=mean",
            "lora.r=16",
            "lora.lora_dropout=0.1",
            "train.epochs=6",
            "train.batch_size=32",
            "train.learning_rate=2e-3",
        ],
        "accuracy",
        lambda _: (0.925, True),
        probe=True,
    ),
    "gsm8k": Row(
        [
            "task_type=causal_lm",
            "data=jsonl",
            "data.path=FOLDER/gsm8k",
            "data.prompt_column=question",
            "data.completion_column=answer",
            "data.test_split=test",
            "data.max_tokens=256",
            "data.max_eval_samples=100",
            "train.max_steps=60",
            "train.batch_size=8",
            "train.eval_every=30",
        ],
        "loss",
        lambda untrained: (untrained["loss"] - 0.05, False),
    ),
    "stsb": Row(
        [
            "task_type=feature_extraction",
            "data=csv",
            "data.path=FOLDER/stsb",
            "data.delimiter=tab",
            "data.quoting=false",
            "data.header=[genre,file,year,id,score,sentence1,sentence2]",
            "data.train_split=sts-train",
            "data.eval_split=sts-dev",
            "data.test_split=sts-test",
            "data.score_column=score",
            "data.text_column=sentence1",
            "data.text_pair_column=sentence2",
            "lora.r=16",
            "lora.lora_dropout=0.1",
            "train.epochs=3",
            "train.batch_size=32",
            "train.learning_rate=1e-3",
        ],
        "spearman",
        lambda _: (0.84, True),
    ),
    "wnut17": Row(
        [
            "task_type=token_cls",
            "data=conll",
            "data.path=FOLDER/wnut17",
            "data.train_split=wnut17train",
            "data.eval_split=dev",
            "data.test_split=emerging.test.annotated",
            "lora.r=16",
            "lora.lora_dropout=0.1",
            "train.epochs=5",
            "train.batch_size=16",
            "train.learning_rate=5e-4",
        ],
        "f1",
        lambda _: (0.25, True),
    ),
    "xquad": Row(
        [
            "task_type=question_ans",
            "data=squad",
            "data.path=FOLDER/xquad/xquad.en.json",
            "data.max_tokens=192",
            "lora.r=16",
            "train.epochs=3",
            "train.batch_size=16",
            "train.learning_rate=2e-3",
        ],
        "f1",
        lambda untrained: (3 * untrained["f1"], True),
    ),
    "e2e-nlg": Row(
        [
            "task_type=seq_2_seq_lm",
            "data=csv",
            "data.path=FOLDER/e2e-nlg",
            "data.train_split=devset",
            "data.test_split=testset_w_refs",
            "data.source_column=mr",
            "data.target_column=ref",
            "data.max_eval_samples=600",
            "lora.r=16",
            "train.epochs=1",
            "train.batch_size=16",
            "train.learning_rate=1e-3",
        ],
        "loss",
        lambda untrained: (untrained["loss"] / 2, False),
        shuffle=True,
    ),
}


def untrained(overrides: list[str]) -> tuple[dict[str, float], workload.Workload, base_model.Base]:
    """Return the base model's own scores on the test split, a new head as it was drawn."""
    spec = compose.compose_trial(overrides)
    work = workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    base_model.renew_missing(base, spec.train.seed)
    found = evaluation.predict(base.model, work.task, work.examples["test"], spec.train, work.tokenizer.pad_token_id)
    return work.task.metrics(found), work, base


def probe_accuracy(work: workload.Workload, base: base_model.Base) -> float:
    """Return the test accuracy of a logistic regression on mean-pooled frozen embeddings of the same training rows."""
    from sklearn.linear_model import LogisticRegression

    def embedded(split: str) -> tuple[torch.Tensor, list[int]]:
        vectors, labels = [], []
        for start in range(0, len(work.examples[split]), 64):
            batch = work.task.collate([work.examples[split][start : start + 64]], work.tokenizer.pad_token_id)
            with torch.inference_mode():
                hidden_BTD = base.model.base_model(**batch.inputs).last_hidden_state
            mask_BT1 = batch.inputs["attention_mask"][..., None]
            mean_BD = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors.append(torch.nn.functional.normalize(mean_BD, dim=-1))
            labels += batch.labels.tolist()
        return torch.cat(vectors), labels

    x, y = embedded("train")
    fitted = LogisticRegression(C=10.0, max_iter=2000).fit(x.numpy(), y)
    x, y = embedded("test")
    return float(fitted.score(x.numpy(), y))


def trained(overrides: list[str], folder: str) -> dict:
    """Return the trial's result.json; `folder` keeps its adapter."""
    command = [sys.executable, "-m", "lorasweep", *overrides, f"outputs={folder}", "study=one"]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return json.loads((Path(folder) / "one" / "0" / "result.json").read_text())


def loss_of_shuffled_sources(overrides: list[str], folder: str, work: workload.Workload) -> float:
    """Return the test loss when each target comes with another row's source, half the split away."""
    spec = compose.compose_trial(overrides)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    saved = Path(folder) / "one" / "0" / "adapter"
    net = adapter.reload(saved, base, spec.lora, spec.task_type).base_model.model
    examples = work.examples["test"]
    other = [replace(e, inputs=examples[i - len(examples) // 2].inputs) for i, e in enumerate(examples)]
    return work.task.metrics(evaluation.predict(net, work.task, other, spec.train, work.tokenizer.pad_token_id))["loss"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ROWS))
    given = parser.parse_args()
    missed = 0
    print("| task | metric | untrained | test | floor | probe | train s | reload same |")
    print("|---|---|--:|--:|--:|--:|--:|---|")
    for name in given.names or ROWS:
        row = ROWS[name]
        overrides = [o.replace("FOLDER", given.data) for o in row.overrides]
        began = time.perf_counter()
        before, work, base = untrained(overrides)
        probe = probe_accuracy(work, base) if row.probe else None
        print(f"{name}: untrained {before}, {time.perf_counter() - began:.0f} s", file=sys.stderr)
        folder = tempfile.mkdtemp()
        result = trained(overrides, folder)
        score = result["test"][row.metric]
        limit, above = row.floor(before)
        shuffled = loss_of_shuffled_sources(overrides, folder, work) if row.shuffle else None
        shutil.rmtree(folder)
        good = (score >= limit if above else score <= limit) and (probe is None or score > probe)
        good = good and (shuffled is None or shuffled - score >= SOURCE_MATTERS)
        missed += not good
        shown = "-" if probe is None else f"{probe:.4f}"
        if shuffled is not None:
            shown = f"shuffled sources {shuffled:.4f}"
        verdict = "" if good else " MISSED"
        print(
            f"| {name} | {row.metric} | {before[row.metric]:.4f} | {score:.4f} | {limit:.4f}{verdict} "
            f"| {shown} | {result['train_s']:.0f} | {result['reload']['same']} |",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

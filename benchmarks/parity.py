"""Our numbers beside those of transformers, peft, scikit-learn, seqeval and torchmetrics, each task on several models.

    python benchmarks/parity.py [--jobs 2] [--only BERT seq_cls ...]

Models are tiny and random, from seeds; dropout is off. Training and evaluation are in double precision on both sides
(numbers in the two files beside this one say how). Prints a Markdown table, and fails where a difference is above
LIMITS. Columns:

- losses: largest relative difference of ten steps' losses from transformers.Trainer on a peft model, on the same rows
  in the same order, from the same A and head
- metrics: largest difference (above 1: relative) of a metric of eval from scikit-learn's, seqeval's or torchmetrics',
  of what Trainer's model predicts
- predict: largest difference of an answer's numbers from a plain pipeline's on the merged export (1: other words)
- export: largest relative difference of a row's logits or vector, exported adapter on plain transformers and peft
- merged: the same of the merged export, whose weights are in single precision
- packed: largest relative difference of the losses of three trials of ranks 2, 4 and 8 in one pass from each alone
"""

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import parity_models
import torch
import transformers
from parity_reference import NEW_TOKENS, REFERENCES, Reference
from support.double import double_precision

import lorasweep
from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.serving import export, predict, winner
from lorasweep.study.study import Study
from lorasweep.tasks.batches import epochs
from lorasweep.training import engine, workload

STEPS, BATCH, ROWS, EVAL_ROWS = 10, 8, 48, 16
RANKS = (2, 4, 8)

TASKS: dict[str, tuple[str, ...]] = {
    "seq_cls": ("BERT", "DeBERTa", "XLNet", "GPT-2", "Llama", "T5", "BART"),
    "token_cls": ("BERT", "ModernBERT", "DeBERTa", "XLNet", "Qwen2", "T5"),
    "question_ans": ("BERT", "RoBERTa", "XLNet", "Qwen3", "BART"),
    "causal_lm": ("GPT-2", "Llama", "Llama, tied", "Qwen2", "Gemma"),
    "seq_2_seq_lm": ("T5", "mT5", "BART", "Pegasus"),
    "feature_extraction": ("BERT", "RoBERTa", "ModernBERT", "DeBERTa", "Llama"),
}
LIMITS = {"losses": 1e-9, "metrics": 1e-6, "predict": 1e-5, "export": 1e-9, "merged": 1e-5, "packed": 1e-9}
"""Largest differences that are rounding; torchmetrics counts and weights that are merged are in single precision."""


@dataclass(frozen=True)
class Row:
    task: str
    architecture: str
    cells: dict[str, float]
    alone: bool
    """Whether its trials share no pass."""

    @property
    def wrong(self) -> list[str]:
        return [name for name, value in self.cells.items() if not value <= LIMITS[name]]

    def line(self) -> str:
        numbers = " | ".join(f"{value:.1e}" if value else "0" for value in self.cells.values())
        return f"| {self.task} | {self.architecture}{' (alone)' if self.alone else ''} | {numbers} |"


def row(task: str, architecture: str) -> Row:
    """Compare one model on one task with the reference."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder, kind = Path(name), REFERENCES[task]
        model = parity_models.save_model(architecture, kind.auto, folder / "model")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        (folder / "data").mkdir()
        parity_models.save_data(task, folder / "data", ROWS, EVAL_ROWS, tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        train, rows = (parity_models.records_of(task, folder / "data", split) for split in ("train", "eval"))
        compared = Compared(task, folder, kind(tokenizer, train, rows))
        with double_precision():
            cells = compared.trained() | compared.packed()
        cells |= compared.shipped()
        return Row(task, architecture, {name: cells[name] for name in LIMITS}, compared.alone)


class Compared:
    """One model on one task, ours and the reference."""

    def __init__(self, task: str, folder: Path, reference: Reference) -> None:
        self.folder, self.reference = folder, reference
        self.overrides = [
            f"task_type={task}",
            f"task_type.max_new_tokens={NEW_TOKENS}",
            f"task_type.generate={str(task == 'seq_2_seq_lm').lower()}",
            *(f"model.{key}=null" for key in ("decoder", "sha256")),
            f"model.pretrained={folder / 'model'}",
            "model.pooling=model",
            "data=auto",
            f"data.path={folder / 'data'}",
            "data.eval_split=eval",
            "data.test_split=test",
            *(["data.prompt_column=prompt", "data.completion_column=completion"] if task == "causal_lm" else []),
            f"train.max_steps={STEPS}",
            f"train.batch_size={BATCH}",
            "train.learning_rate=1e-2",
            "train.warmup_ratio=0.1",
            "train.precision=fp32",
            "lora.r=4",
            "lora.lora_alpha=8",
        ]
        self.spec = compose.compose_trial(self.overrides)
        self.work = workload.workload(self.spec)
        self.alone = False

    def trained(self) -> dict[str, float]:
        """Compare ten steps, and the metrics that they lead to."""
        base = base_model.load(self.spec.model, self.spec.train, self.work.task, self.work.tokenizer)
        start = adapter.attach(base, self.spec.lora, self.spec.task_type, self.spec.train.seed)
        adapter.save(start, self.folder / "start")
        adapter.detach(start)
        ours, metrics = self._ours([self.spec])
        model = self.reference.adapted(self.folder / "model", self.folder / "start", trains=True)
        theirs = self.reference.losses(model, self._order(), self._arguments())
        expected = self.reference.metrics(model.eval())
        return {
            "losses": relative(ours[0], theirs),
            "metrics": max(abs(expected[name] - value) / max(1.0, abs(value)) for name, value in metrics.items()),
        }

    def _order(self) -> list[int]:
        """Return the rows of train in the order in which a trial sees them."""
        batches = epochs(self.work.examples["train"], BATCH, self.spec.train.seed)
        return [example.row for _, batch in zip(range(STEPS), batches, strict=False) for example in batch]

    def _arguments(self) -> transformers.TrainingArguments:
        train = self.spec.train
        return transformers.TrainingArguments(
            output_dir=str(self.folder / "trainer"),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=train.learning_rate,
            warmup_steps=STEPS // 10,
            lr_scheduler_type=train.lr_scheduler_type,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            remove_unused_columns=False,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )

    def _ours(self, specs: Sequence[Any]) -> tuple[dict[int, list[float]], dict[str, float]]:
        """Return each trial's losses, all in one pass where they may share it, and the last one's metrics."""
        base = base_model.load(self.spec.model, self.spec.train, self.work.task, self.work.tokenizer)
        made = engine.Engine(base, self.work.task, self.work.prepared())
        made.width = len(specs)
        todo, losses = [engine.Job(i, spec) for i, spec in enumerate(specs)], {i: [] for i in range(len(specs))}
        metrics: dict[str, float] = {}
        widths: set[int] = set()
        for event in made.run(lambda: todo.pop(0) if todo else None):
            match event:
                case engine.StepEvent():
                    widths.add(len(made.slots))
                    losses[event.number].append(event.loss)
                case engine.EvalEvent():
                    metrics = event.metrics
        self.alone = max(widths) < len(specs) or made.limits.most < len(specs)
        return losses, metrics

    def packed(self) -> dict[str, float]:
        specs = [compose.compose_trial([*self.overrides, f"lora.r={r}", f"train.seed={r}"]) for r in RANKS]
        alone = [self._ours([spec])[0][0] for spec in specs]
        together, _ = self._ours(specs)
        return {"packed": max(relative(together[i], losses) for i, losses in enumerate(alone))}

    def shipped(self) -> dict[str, float]:
        """Run a whole trial, export it twice and compare what others load with the trial: as it is used, in single
        precision, but for the comparison.
        """
        result = lorasweep.run([*self.overrides, "tracking=none", f"outputs={self.folder / 'outputs'}"])
        assert result["state"] == "COMPLETE", result["traceback"]
        study = Study.open(Path(result["folder"]))
        for name, merged in (("adapter", False), ("merged", True)):
            export.export(study, 0, self.folder / name, merged=merged)
        with double_precision():
            return self._as_shipped(study)

    def _as_shipped(self, study: Study) -> dict[str, float]:
        reference = self.reference
        trial = winner.load(study.trial_folder(0)).model.double()
        expected = reference.outputs(trial)
        adapted = reference.outputs(reference.adapted(self.folder / "model", self.folder / "adapter"))
        merged_model = getattr(transformers, reference.auto).from_pretrained(self.folder / "merged").double().eval()
        loaded = predict.load(study.trial_folder(0))
        loaded.model.double()
        answers = predict.answers(loaded, [reference.fields(record) for record in reference.eval])
        return {
            "predict": reference.apart(merged_model, answers),
            "export": apart(adapted, expected),
            "merged": apart(reference.outputs(merged_model), expected),
        }


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference."""
    assert len(found) == len(expected), (len(found), len(expected))
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def apart(found: Sequence[Sequence[torch.Tensor]], expected: Sequence[Sequence[torch.Tensor]]) -> float:
    """Return the largest relative difference of a row's answers."""
    pairs = [pair for rows in zip(found, expected, strict=True) for pair in zip(*rows, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--only", nargs="*", default=[], help="names of tasks and architectures")
    options = parser.parse_args()
    asked = [(task, name) for task, names in TASKS.items() for name in names]
    for group in (set(TASKS), set(parity_models.ARCHITECTURES)):
        wanted = group & set(options.only)
        asked = [pair for pair in asked if not wanted or wanted & set(pair)]
    columns = ["task", "model", *LIMITS]
    print(f"| {' | '.join(columns)} |\n|---|---|{'--:|' * len(LIMITS)}", flush=True)
    wrong = []
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawned) as pool:
        for found in pool.map(row, *zip(*asked, strict=True)):
            print(found.line(), flush=True)
            wrong += [f"{found.task}, {found.architecture}: {name} is above {LIMITS[name]:g}" for name in found.wrong]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""The loop people write: LoRA trials with HF Trainer, peft and MLflow, one after another. Prints a JSON line a trial.

It takes lorasweep's override strings, so that both sides train the same examples with the same settings; `--many FILE`
takes a JSON list of such lists, run in one process with the data tokenised once:
    python benchmarks/trainer_loop.py train.max_steps=20 lora.r=8
The base's own dropout is off; batches are padded to their longest row, and grouped by length unless --sampling=random.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import peft
import transformers
from datasets import Dataset

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.data import dataset
from lorasweep.lora import peft_config
from lorasweep.models import base_model

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


class Loop:
    """What all trials share: the task, the tokenizer and the tokenised splits."""

    def __init__(self, overrides: list[str], sampling: str) -> None:
        self.sampling = sampling
        spec = compose.compose_trial(overrides)
        self.task = tasks.make(spec.task_type)
        loaded = dataset.load(spec.data, self.task.columns(spec.data), self.task.name)
        self.task.fit(loaded)
        self.tokenizer = base_model.load_tokenizer(spec.model)
        self.whole_test: Dataset | None = None
        self.splits = {name: self._tokens(spec.data, records) for name, records in loaded.splits.items()}
        self.folder = Path(tempfile.mkdtemp())
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{self.folder}/mlflow.db"
        os.environ["MLFLOW_EXPERIMENT_NAME"] = "loop"

    def _tokens(self, spec: Any, records: list) -> Dataset:
        index = {c: i for i, c in enumerate(self.task.classes)}
        table = Dataset.from_dict(
            {"text": [r["text"] for r in records], "labels": [index[str(r["label"])] for r in records]}
        )
        return table.map(
            lambda batch: self.tokenizer(batch["text"], truncation=True, max_length=spec.max_tokens),
            batched=True,
            remove_columns=["text"],
        )

    def adapted(self, spec: Any) -> Any:
        """Return a fresh base with the trial's adapter."""
        transformers.set_seed(spec.train.seed)
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            base_model.source(spec.model), **self.task.model_kwargs(), **dict.fromkeys(DROPOUTS, 0.0)
        )
        lora = peft_config.config(spec.lora, spec.task_type, base_model.skeleton(spec.model, self.task, self.tokenizer))
        return peft.get_peft_model(base, lora)

    def arguments(self, train: Any) -> Any:
        return transformers.TrainingArguments(
            output_dir=str(self.folder),
            num_train_epochs=train.epochs,
            max_steps=train.max_steps or -1,
            per_device_train_batch_size=train.batch_size,
            per_device_eval_batch_size=train.eval_batch_size,
            learning_rate=train.learning_rate,
            lr_scheduler_type=train.lr_scheduler_type,
            warmup_steps=train.warmup_ratio,  # below 1 it is a share of the steps
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm,
            train_sampling_strategy=self.sampling,
            eval_strategy="epoch",
            save_strategy="no",
            logging_steps=1,
            report_to=["mlflow"],
            disable_tqdm=True,
            seed=train.seed,
            dataloader_pin_memory=False,
        )

    def trial(self, overrides: list[str]) -> dict[str, Any]:
        """Train one trial; `right` tells for each row of the whole test split whether it answers well, and is not in
        the times."""
        import mlflow

        spec = compose.compose_trial(overrides)
        net = self.adapted(spec)
        trainer = transformers.Trainer(
            model=net,
            args=self.arguments(spec.train),
            train_dataset=self.splits["train"],
            eval_dataset=self.splits["eval"],
            data_collator=transformers.DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
            compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
        )
        began = time.perf_counter()
        trainer.train()
        net.save_pretrained(self.folder / "adapter")
        mlflow.end_run()
        took, process_s = time.perf_counter() - began, time.perf_counter() - STARTED
        right = self._right(trainer, overrides) if "--test" in sys.argv else None
        history = [e for e in trainer.state.log_history if "eval_accuracy" in e]
        return {
            "accuracy": history[-1]["eval_accuracy"],
            "loss": history[-1]["eval_loss"],
            "evaluations": len(history),
            "steps": trainer.state.global_step,
            "trial_s": took,
            "process_s": process_s,
            "right": right,
            "test_s": time.perf_counter() - STARTED - process_s,
        }

    def _right(self, trainer: Any, overrides: list[str]) -> list[int]:
        if self.whole_test is None:
            from pruning import WHOLE_TEST  # not at the start, which counts

            whole = compose.compose_trial([*overrides, *WHOLE_TEST]).data
            self.whole_test = self._tokens(
                whole, dataset.load(whole, self.task.columns(whole), self.task.name).splits["test"]
            )
        trainer.callback_handler.callbacks = []
        trainer.args.train_sampling_strategy = "random"  # by length, it shuffles what is evaluated too
        found = trainer.predict(self.whole_test)
        return (np.argmax(found.predictions, -1) == found.label_ids).astype(int).tolist()


def main(words: list[str]) -> None:
    flags = [w for w in words if w == "--test" or w.startswith("--sampling=")]
    sampling = next((w.partition("=")[2] for w in flags if w.startswith("--sampling=")), "group_by_length")
    words = [w for w in words if w not in flags]
    many = json.loads(Path(words[1]).read_text()) if words[:1] == ["--many"] else [words]
    loop = Loop(many[0], sampling)
    start_s = time.perf_counter() - STARTED
    for overrides in many:
        print(json.dumps(loop.trial(overrides) | {"start_s": start_s}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

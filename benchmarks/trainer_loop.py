"""The loop people write: one LoRA trial with HF Trainer, peft and MLflow. Prints one JSON line.

It takes lorasweep's override strings, so that both sides train the same examples with the same settings:
    python benchmarks/trainer_loop.py train.max_steps=20 lora.r=8
The base's own dropout is off, batches are padded to their longest row and grouped by length.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import peft
import transformers
from datasets import Dataset

from lorasweep import compose, data, model, tasks

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def rows(spec, task, split, tokenizer) -> Dataset:
    records = data.load(spec.data, task.columns(spec.data), task.name).splits[split]
    index = {c: i for i, c in enumerate(task.classes)}
    table = Dataset.from_dict(
        {"text": [r["text"] for r in records], "labels": [index[str(r["label"])] for r in records]}
    )
    return table.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=spec.data.max_tokens),
        batched=True,
        remove_columns=["text"],
    )


def main(overrides: list[str]) -> dict:
    spec = compose.compose_trial(overrides)
    task = tasks.make(spec.task_type)
    task.fit(data.load(spec.data, task.columns(spec.data), task.name))
    tokenizer = model.load_tokenizer(spec.model)
    transformers.set_seed(spec.train.seed)
    off = dict.fromkeys(DROPOUTS, 0.0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model.source(spec.model), **task.model_kwargs(), **off
    )
    lora = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=spec.lora.r,
        lora_alpha=spec.lora.alpha,
        lora_dropout=spec.lora.lora_dropout,
        target_modules=spec.lora.target_modules,
    )
    net = peft.get_peft_model(base, lora)
    folder = Path(tempfile.mkdtemp())
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["MLFLOW_EXPERIMENT_NAME"] = "loop"
    train = spec.train
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.eval_batch_size,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_ratio,  # below 1 it is a share of the steps
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        train_sampling_strategy="group_by_length",
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=1,
        report_to=["mlflow"],
        disable_tqdm=True,
        seed=train.seed,
        dataloader_pin_memory=False,
    )
    trainer = transformers.Trainer(
        model=net,
        args=arguments,
        train_dataset=rows(spec, task, "train", tokenizer),
        eval_dataset=rows(spec, task, "eval", tokenizer),
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    began = time.perf_counter()
    trainer.train()
    net.save_pretrained(folder / "adapter")
    took = time.perf_counter() - began
    history = [e for e in trainer.state.log_history if "eval_accuracy" in e]
    return {
        "accuracy": history[-1]["eval_accuracy"],
        "loss": history[-1]["eval_loss"],
        "evaluations": len(history),
        "steps": trainer.state.global_step,
        "trial_s": took,
        "process_s": time.perf_counter() - STARTED,
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))

"""Our loop against HF Trainer with peft: same order of examples, same fresh adapter, no dropout, the same losses."""

from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.data import DataLoader

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.data import dataset
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.tasks.batches import epochs
from lorasweep.tasks.task import Example
from lorasweep.training import engine, workload

STEPS = 20


class Recorder(transformers.Trainer):
    """A Trainer that takes its batches as they are and keeps the loss of each."""

    def __init__(self, batches: list[dict], **kwargs) -> None:
        super().__init__(**kwargs)
        self.batches = batches
        self.losses: list[float] = []

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, shuffle=False)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses.append(float(loss))
        return loss


def ours(spec, work: workload.Workload) -> list[float]:
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    todo = [engine.Job(0, spec)]
    events = engine.Engine(base, work.task, work.prepared()).run(lambda: todo.pop() if todo else None)
    return [e.loss for e in events if isinstance(e, engine.StepEvent)]


def theirs(spec, work: workload.Workload, folder: Path, micro: int) -> list[float]:
    """Return the loss of each optimiser step of Trainer, micro batches added up."""
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    peft_model = adapter.attach(base, spec.lora, spec.task_type, spec.train.seed).peft_model
    for module in peft_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    batches = []
    order = epochs(work.examples["train"], spec.train.batch_size, spec.train.seed)
    for _ in range(STEPS):
        examples = next(order)
        for i in range(0, len(examples), micro):
            batch = work.task.collate([examples[i : i + micro]], work.tokenizer.pad_token_id)
            batches.append(dict(batch.inputs) | {"labels": batch.labels})
    accumulate = spec.train.batch_size // micro
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=spec.train.learning_rate,
        warmup_steps=2,
        lr_scheduler_type=spec.train.lr_scheduler_type,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=spec.train.max_grad_norm,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Recorder(batches, model=peft_model, args=arguments)
    trainer.train()
    parts = trainer.losses
    return [sum(parts[i : i + accumulate]) for i in range(0, len(parts), accumulate)]


def overrides(kind: str, folder: Path, *more: str) -> list[str]:
    return [
        f"task_type={kind}",
        f"model.pretrained={folder}",
        f"train.max_steps={STEPS}",
        "train.warmup_ratio=0.1",
        "train.batch_size=8",
        "train.learning_rate=1e-2",
        "data.max_train_samples=96",
        "data.max_eval_samples=8",
        "data.max_tokens=32",
        *more,
    ]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("micro", [8, 4])
def test_seq_cls_losses_equal_trainers(tiny_bert, tmp_path, schedule, micro):
    """With accumulation, too: Trainer gets the whole batch, since it adds up BERT's means without dividing."""
    more = [f"train.lr_scheduler_type={schedule}", f"train.micro_batch_size={micro}"]
    spec = compose.compose_trial(overrides("seq_cls", tiny_bert, *more))
    work = workload.workload(spec)
    expected = theirs(spec, work, tmp_path, micro=8)
    assert ours(spec, work) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.parametrize("micro", [8, 4])
def test_causal_lm_losses_equal_trainers(tiny_llama, tmp_path, micro):
    """Rows of unequal length: a mean over micro batches of means would differ."""
    spec = compose.compose_trial(overrides("causal_lm", tiny_llama, f"train.micro_batch_size={micro}"))
    work = workload.workload(spec)
    expected = theirs(spec, work, tmp_path, micro)
    assert ours(spec, work) == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0]


@pytest.mark.slow
def test_losses_equal_trainers_on_a_real_model(tmp_path):
    spec = compose.compose_trial([f"train.max_steps={STEPS}", "train.batch_size=8", "train.warmup_ratio=0.1"])
    work = workload.workload(spec)
    assert ours(spec, work) == pytest.approx(theirs(spec, work, tmp_path, micro=8), abs=1e-4)


def test_epoch_holds_every_example_once_in_batches_of_similar_length():
    examples = [Example(row=i, inputs={"input_ids": [0] * (1 + i % 37)}, target=0, supervised=1) for i in range(203)]
    batches = epochs(examples, 8, seed=3)
    first = [next(batches) for _ in range(26)]
    assert sorted(e.row for batch in first for e in batch) == list(range(203))
    assert max(max(map(len, b)) - min(map(len, b)) for b in first) < 5
    second = [next(batches) for _ in range(26)]
    assert [e.row for b in second for e in b] != [e.row for b in first for e in b]


def test_same_seed_gives_the_same_losses_with_dropout(tiny_bert):
    spec = compose.compose_trial(overrides("seq_cls", tiny_bert, "lora.lora_dropout=0.3", "train.max_steps=4"))
    work = workload.workload(spec)
    assert ours(spec, work) == ours(spec, work)


def test_data_is_shared_by_equal_specs(tiny_bert):
    spec = compose.compose_trial(overrides("seq_cls", tiny_bert))
    task = tasks.make(spec.task_type)
    columns = task.columns(spec.data)
    assert dataset.load(spec.data, columns, task.builtin) is dataset.load(spec.data, columns, task.builtin)

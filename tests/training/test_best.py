"""The best evaluation of a trial is kept and patience ends it, as transformers' Trainer does on the same run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import parity
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalPrediction

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.tasks.batches import epochs
from lorasweep.training import engine, workload
from lorasweep.training.best import Best

STEPS, EVERY = 16, 2
SETTINGS = [
    f"train.max_steps={STEPS}",
    f"train.eval_every={EVERY}",
    "train.warmup_ratio=0.125",
    "train.batch_size=8",
    "train.learning_rate=3e-2",
    "data.max_train_samples=48",
    "data.max_eval_samples=24",
    "data.max_tokens=32",
]
"""A rate at which the tiny model's eval loss falls and rises again."""


class WithBatches(transformers.Trainer):
    """A Trainer that takes our batches in our order."""

    def __init__(self, train: list[dict], held_out: list[dict], **kwargs: Any) -> None:
        super().__init__(eval_dataset=held_out, **kwargs)
        self.train_batches, self.eval_batches = train, held_out

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.train_batches, batch_size=None, shuffle=False)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return DataLoader(self.eval_batches, batch_size=None, shuffle=False)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def theirs(spec, work: workload.Workload, folder: Path, metric: str, patience: int | None):
    """Return Trainer's state and its weights in the end."""
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    peft_model = adapter.attach(base, spec.lora, spec.task_type, spec.train.seed).peft_model
    for module in peft_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def batch(examples) -> dict:
        made = work.task.collate([examples], work.tokenizer.pad_token_id)
        return dict(made.inputs) | {"labels": made.labels}

    order = epochs(work.examples["train"], spec.train.batch_size, spec.train.seed)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=spec.train.learning_rate,
        warmup_steps=2,
        report_to=[],
        eval_strategy="steps",
        eval_steps=EVERY,
        save_strategy="steps",
        save_steps=EVERY,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
        greater_is_better=metric == "accuracy",
        use_cpu=True,
    )
    stops = [transformers.EarlyStoppingCallback(patience)] if patience else []
    trainer = WithBatches(
        [batch(next(order)) for _ in range(STEPS)],
        [batch(work.examples["eval"])],
        model=peft_model,
        args=arguments,
        compute_metrics=accuracy,
        callbacks=stops,
    )
    trainer.train()
    return trainer.state, {n: p.detach().clone() for n, p in peft_model.named_parameters() if p.requires_grad}


def ours(spec, work: workload.Workload) -> tuple[engine.TrialEnded, dict[str, torch.Tensor], list[engine.EvalEvent]]:
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    todo, evaluations = [engine.Job(0, spec)], []
    for event in engine.Engine(base, work.task, work.prepared()).run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.EvalEvent):
            evaluations.append(event)
        if isinstance(event, engine.TrialEnded):
            return event, {n: p.detach().clone() for n, p in event.attached.trained().items()}, evaluations
    raise AssertionError("the trial has not ended")


@pytest.mark.parametrize(("metric", "patience"), [("loss", None), ("accuracy", None), ("loss", 2), ("accuracy", 3)])
def test_best_evaluation_and_early_stop_are_trainers(tiny_bert, tmp_path, metric, patience):
    more = [f"task_type.primary={metric}", f"train.patience={patience or 'null'}"]
    spec = compose.compose_trial(["task_type=seq_cls", f"model.pretrained={tiny_bert}", *SETTINGS, *more])
    work = workload.workload(spec)
    state, weights = theirs(spec, work, tmp_path, metric, patience)
    ended, tensors, evaluations = ours(spec, work)
    assert ended.kept is not None and ended.state == "COMPLETE"
    assert (ended.kept.step, ended.step) == (state.best_global_step, state.global_step)
    assert ended.kept.metrics[metric] == pytest.approx(state.best_metric, abs=1e-4)
    assert len(evaluations) == state.global_step // EVERY
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, weights[name], atol=1e-4, rtol=1e-3)
    assert ended.kept.step < STEPS, "a run that is best in the end shows nothing"
    if patience:
        assert ended.step < STEPS and ended.reason.startswith(f"train.patience={patience}: ")


def evaluated(step: int, value: float) -> engine.EvalEvent:
    return engine.EvalEvent(0, step, 0.0, {"accuracy": value}, [], 0.0)


def test_of_equal_evaluations_the_first_is_kept_and_patience_counts_the_second():
    best, weight = Best("accuracy", True, True, 2), torch.zeros(2)
    for step, value, reason in ((1, 0.5, ""), (2, 0.5, ""), (3, float("nan"), "train.patience=2: ")):
        weight.fill_(step)
        said = best.take(evaluated(step, value), {"w": weight}, is_last=False)
        assert said.startswith(reason) and bool(said) == bool(reason)
    best.put_back({"w": weight})
    assert best.kept is not None and best.kept.step == 1 and weight.tolist() == [1, 1]


def test_last_evaluation_is_kept_where_that_is_asked_for(tiny_bert):
    spec = compose.compose_trial(
        ["task_type=seq_cls", f"model.pretrained={tiny_bert}", *SETTINGS, "task_type.primary=loss", "train.keep=last"]
    )
    ended, *_ = ours(spec, workload.workload(spec))
    assert ended.kept is not None and ended.kept.step == ended.step == STEPS


def test_trial_in_a_shared_pass_keeps_what_it_keeps_alone(tiny_bert):
    work = parity.workload_of("seq_cls", tiny_bert)
    more = ("train.max_steps=8", "train.eval_every=2", "task_type.primary=loss")
    specs = [parity.spec_of("seq_cls", tiny_bert, *more, f"train.learning_rate={rate}") for rate in (1e-3, 0.1)]
    jobs = [engine.Job(i, s) for i, s in enumerate(specs)]
    together = {n: seen.kept_step for n, seen in parity.run(parity.trainer(specs[0], work), jobs, 2).items()}
    alone = {i: parity.alone(s, work, i).kept_step for i, s in enumerate(specs)}
    assert together == alone and min(alone.values()) < 8


def test_evaluation_for_a_pruner_alone_is_not_kept(tiny_bert):
    work, more = parity.workload_of("seq_cls", tiny_bert), ("train.max_steps=4", "train.eval_every=4")
    spec = parity.spec_of("seq_cls", tiny_bert, *more, "task_type.primary=loss", "train.learning_rate=0.3")
    found = parity.alone(spec, work, eval_steps=frozenset({1, 2, 3}))
    assert found.kept_step == 4

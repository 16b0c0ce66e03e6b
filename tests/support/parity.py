"""What a trial shows when it runs alone and when it runs packed, and how the two are compared."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
import torch

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.memory import out_of_memory
from lorasweep.models import base_model
from lorasweep.training import checkpoint, engine, workload

SMALL = ["model.decoder=null", "data.max_train_samples=40", "data.max_eval_samples=6"]
SMALL += ["data.max_tokens=24", "train.max_steps=10", "train.eval_every=6", "train.batch_size=4"]
SMALL += ["train.learning_rate=1e-2", "lora.r=4"]

MAX_SOLO_RUNS = 64
"""Solo runs that are kept with their gradients, a few MB each."""

EXACT = 1e-9
"""Relative difference allowed in double precision."""

PLAIN = ("lora.r=8", "lora.lora_alpha=3", "train.seed=5", "train.learning_rate=3e-3")
DROPPED = ("lora.r=3", "lora.lora_dropout=0.3", "train.seed=2", "train.batch_size=3")

OPTIONS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "rslora": ("lora.use_rslora=true", "lora.r=2"),
    "dropout": ("lora.lora_dropout=0.4", "train.seed=9"),
    "targets": ("lora.target_modules=[query,dense]",),
    "attention": ("lora.target_modules=attention", "lora.lora_dropout=0.1"),
    "embeddings": ("lora.target_modules=[word_embeddings,position_embeddings,value]",),
    "layers": ("lora.target_modules=[value]", "lora.layers_to_transform=[1]"),
    "rank_pattern": ("lora.rank_pattern={query:2,output.dense:12}", "lora.alpha_pattern={query:1}"),
    "bias_all": ("lora.bias=all", "train.weight_decay=0.1"),
    "bias_lora_only": ("lora.bias=lora_only", "lora.target_modules=[query]", "lora.lora_dropout=0.2"),
    "lora_bias": ("lora.lora_bias=true", "lora.lora_dropout=0.2"),
    "modules_to_save": ("lora.target_modules=attention", "lora.modules_to_save=[layer.1.output.dense,LayerNorm]"),
    "save_a_block": ("lora.target_modules=[query]", "lora.modules_to_save=[layer.1.output]", "lora.bias=all"),
    "gaussian": ("lora.init_lora_weights=gaussian",),
    "random_B": ("lora.init_lora_weights=false",),
    "orthogonal": ("lora.init_lora_weights=orthogonal",),
    "eva": ("lora.init_lora_weights=eva", "train.batch_size=8", "lora.lora_dropout=0.1"),
    "pissa": ("lora.init_lora_weights=pissa", "lora.bias=all"),
    "pissa_dropout": ("lora.init_lora_weights=pissa_niter_2", "lora.lora_dropout=0.3"),
    "olora": ("lora.init_lora_weights=olora",),
    "dora": ("lora.use_dora=true", "lora.lora_dropout=0.2"),
    "dora_olora": ("lora.use_dora=true", "lora.init_lora_weights=olora"),
    "exact_loftq": ("lora.init_lora_weights=loftq", "lora.loftq_bits=8", "lora.loftq_iter=2", "lora.lora_dropout=0.2"),
    "parameters": ("lora.target_modules=[value]", "lora.target_parameters=[query.weight,output.dense.weight]"),
    "loraplus": ("lora.loraplus_lr_ratio=16", "train.adam_beta2=0.9"),
    "micro_batches": ("train.batch_size=8", "train.micro_batch_size=3", "lora.lora_dropout=0.2"),
    "schedule": ("train.lr_scheduler_type=cosine", "train.warmup_ratio=0.5", "train.max_grad_norm=0.01"),
    "constant": ("train.lr_scheduler_type=constant", "train.max_grad_norm=0", "lora.alpha_ratio=2"),
    "moments": ("train.adam_beta1=0.5", "train.adam_epsilon=1e-4", "train.weight_decay=0.3"),
    "exclude": ("lora.target_modules=[query,dense]", "lora.exclude_modules=[intermediate.dense]"),
    "layers_pattern": ("lora.target_modules=[key]", "lora.layers_to_transform=0", "lora.layers_pattern=layer"),
    "recompute": ("train.gradient_checkpointing=true", "lora.lora_dropout=0.2"),
    "steps": ("train.max_steps=2", "train.batch_size=16"),
}

TASKS = ("seq_cls", "causal_lm", "token_cls", "question_ans", "seq_2_seq_lm", "feature_extraction")


def models(task: str, bert: Path, language_model: Path) -> tuple[Path, list[str]]:
    """Return the model of a task, and what else it is made of."""
    more = [f"model.decoder={bert}"] if task == "seq_2_seq_lm" else []
    return language_model if task == "causal_lm" else bert, more


@dataclass
class Seen:
    """What a trial showed."""

    losses: list[float] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    state: str = ""
    steps: int = 0
    kept_step: int = 0


@cache
def workload_of(task: str, folder: Path, *more: str) -> workload.Workload:
    return workload.workload(compose.compose_trial([f"task_type={task}", f"model.pretrained={folder}", *SMALL, *more]))


@cache
def spec_of(task: str, folder: Path, *more: str):
    return compose.compose_trial([f"task_type={task}", f"model.pretrained={folder}", *SMALL, *more])


def trainer(spec, work: workload.Workload) -> engine.Engine:
    return engine.Engine(base_model.load(spec.model, spec.train, work.task, work.tokenizer), work.task, work.prepared())


def run(
    made: engine.Engine, jobs: Sequence[engine.Job], width: int, act: Callable[[engine.Event], None] = lambda e: None
) -> dict[int, Seen]:
    """Run trials in `width` slots; `act` sees each event."""
    made.width = width
    todo, seen = list(jobs), {job.number: Seen() for job in jobs}
    update = made._update

    def watched(slot, rate, norm):
        seen[slot.number].gradients.append(
            {n: p.grad.clone() for n, p in slot.attached.trained().items() if p.grad is not None}
        )
        update(slot, rate, norm)

    made._update = watched
    for event in made.run(lambda: todo.pop(0) if todo else None):
        one = seen[event.number]
        match event:
            case engine.StepEvent():
                one.losses.append(event.loss)
            case engine.EvalEvent():
                one.metrics.append(event.metrics)
            case engine.TrialEnded():
                one.state, one.steps = event.state, event.step
                one.kept_step = event.kept.step if event.kept else 0
                one.tensors = checkpoint.copied(event.attached.trained())
                adapter.tensors(event.attached)  # it is on the base
        act(event)
    return seen


precision = ""
"""Name of the fixture that computes in double precision, if any: a solo run in another precision is another run."""

_solo_runs: dict[tuple[str, str], Seen] = {}


def alone(spec, work: workload.Workload, number: int = 0, **job) -> Seen:
    """Return what a trial shows alone. Its spec decides all of that, so that it runs once, unless it is resumed."""
    key = (precision, repr(spec))
    if job or key not in _solo_runs:
        seen = run(trainer(spec, work), [engine.Job(number, spec, **job)], 1)[number]
        if job:
            return seen
        if len(_solo_runs) >= MAX_SOLO_RUNS:
            del _solo_runs[next(iter(_solo_runs))]
        _solo_runs[key] = seen
    return _solo_runs[key]


def close(found: Seen, expected: Seen, rtol: float) -> None:
    assert (found.state, found.steps, found.kept_step) == (expected.state, expected.steps, expected.kept_step)
    assert found.losses == pytest.approx(expected.losses, rel=rtol)
    assert len(found.metrics) == len(expected.metrics)
    for one, other in zip(found.metrics, expected.metrics, strict=True):
        assert one == pytest.approx(other, rel=max(rtol, 1e-6), nan_ok=True)
    pairs = [*zip(found.gradients, expected.gradients, strict=True), (found.tensors, expected.tensors)]
    for one, other in pairs:
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            torch.testing.assert_close(one[name], tensor, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def passes(made: engine.Engine) -> list[int]:
    """Return a list to which each pass adds how many trials share it."""
    backward, widths = made.passes._backward, []

    def watched(group, together):
        widths.append(len(group))
        backward(group, together)

    made.passes._backward = watched
    return widths


def check(task: str, folder: Path, trials: Sequence[tuple[str, ...]], width: int, rtol: float, *more: str) -> None:
    """Compare trials in a pack with each by itself."""
    specs = [spec_of(task, folder, *more, *one) for one in trials]
    work = workload_of(task, folder, *more)
    jobs = [engine.Job(i, spec) for i, spec in enumerate(specs)]
    made = trainer(specs[0], work)
    before = {n: w.clone() for n, w in made.base.model.state_dict().items() if not n.startswith(made.base.missing)}
    widths = passes(made)
    found = run(made, jobs, width)
    assert made.limits.most == out_of_memory.MOST_SLOTS and max(widths) == min(width, len(jobs)), (
        "they did not share a pass"
    )
    for job in jobs:
        close(found[job.number], alone(job.spec, work, job.number), rtol)
    after = made.base.model.state_dict()
    assert all(torch.equal(after[n], w) for n, w in before.items())


def tensors() -> list[torch.Tensor]:
    """Return the tensors that are alive; isinstance would ask every object for its class, and some warn when asked."""
    return [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]

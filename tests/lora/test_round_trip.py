"""Train three steps, save, load with plain peft onto a fresh base: the same outputs, for every task and option."""

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from lorasweep.config import compose
from lorasweep.lora import adapter, peft_config
from lorasweep.models import base_model
from lorasweep.training import engine, evaluation, workload

TASKS = ["seq_cls", "causal_lm", "seq_2_seq_lm", "token_cls", "question_ans", "feature_extraction"]

INITS = ["true", "false", "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "loftq", "eva"]

OPTIONS = {
    "rslora": ["lora.use_rslora=true"],
    "dora": ["lora.use_dora=true"],
    "lora_bias": ["lora.lora_bias=true"],
    "bias_all": ["lora.bias=all"],
    "bias_lora_only": ["lora.bias=lora_only"],
    "layers": ["lora.target_modules=attention", "lora.layers_to_transform=[1]"],
    "loraplus": ["lora.loraplus_lr_ratio=16", "lora.lora_dropout=0.2"],
    "pissa_rslora_bias": ["lora.init_lora_weights=pissa", "lora.use_rslora=true", "lora.bias=all"],
    "pissa_rank_pattern": [
        "lora.init_lora_weights=pissa",
        "lora.use_rslora=true",
        "lora.rank_pattern={q_proj:2}",
        "lora.alpha_pattern={q_proj:4}",
    ],
    "modules_to_save": ["lora.target_modules=attention", "lora.modules_to_save=[LAST]"],
    "dora_olora": ["lora.use_dora=true", "lora.init_lora_weights=olora"],
}

PLACES = ["modules_to_save", "bias_all"]
"""Options that meet what differs among tasks: heads and modules of their models."""

LAST = {"causal_lm": "lm_head", "seq_2_seq_lm": "lm_head"}
"""A module to train in full; others have a projection of the second layer."""


@cache
def trial(task: str, folder: Path, more: tuple[str, ...]):
    spec = compose.compose_trial(
        [
            f"task_type={task}",
            f"model.pretrained={folder}",
            "model.decoder=null",
            "data.max_train_samples=48",
            "data.max_eval_samples=12",
            "data.max_tokens=48",
            "train.max_steps=3",
            "train.learning_rate=1e-2",
            "train.batch_size=8",
            "lora.r=4",
            *more,
        ]
    )
    return spec, workload_of(task, folder)


@cache
def workload_of(task: str, folder: Path) -> workload.Workload:
    return workload.workload(
        compose.compose_trial(
            [
                f"task_type={task}",
                f"model.pretrained={folder}",
                "model.decoder=null",
                "data.max_train_samples=48",
                "data.max_eval_samples=12",
                "data.max_tokens=48",
            ]
        )
    )


def outputs(net, work) -> list[torch.Tensor]:
    """Return what the whole model gives for the eval split: logits, or hidden states where there is no head."""
    batch = work.task.collate([work.examples["eval"]], work.tokenizer.pad_token_id)
    known = ("input_ids", "attention_mask", "token_type_ids", "decoder_input_ids")
    inputs = {k: v for k, v in batch.inputs.items() if k in known}
    if "labels" not in inputs and work.task.name == "SEQ_2_SEQ_LM" and "decoder_input_ids" not in inputs:
        inputs["labels"] = batch.labels
    with torch.no_grad():
        found = net(**inputs)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [found[n] for n in names if n in found and found[n] is not None][:2]


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest value, or of 1 where all values are below it."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1))


def check_round_trip(task: str, folder: Path, target: Path, *more: str) -> None:
    more = tuple(m.replace("LAST", LAST.get(task, "layer.1.output.dense")) for m in more)
    spec, work = trial(task, folder, more)
    assert (
        peft_config.problems(spec.lora, spec.task_type, base_model.skeleton(spec.model, work.task, work.tokenizer))
        == []
    )

    def load() -> base_model.Base:
        return base_model.load(spec.model, spec.train, work.task, work.tokenizer)

    base = load()
    base_model.renew_missing(base, spec.train.seed)
    untrained = outputs(base.model, work)
    todo = [engine.Job(0, spec)]
    for event in engine.Engine(base, work.task, work.prepared()).run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.TrialBegan) and spec.lora.init_lora_weights not in (False, "loftq"):
            for fresh, before in zip(outputs(event.attached.peft_model.base_model.model, work), untrained, strict=True):
                assert gap(fresh, before) <= 1e-5
        if isinstance(event, engine.TrialEnded):
            assert event.state == "COMPLETE", event.reason
            trained = outputs(event.attached.peft_model.base_model.model, work)
            adapter.save(event.attached, target)
    with warnings.catch_warnings():  # what peft says of every adapter of a kind is ours to put right
        warnings.filterwarnings("error", message=".*eva_config.*")
        reloaded = adapter.reload(target, load(), spec.lora, spec.task_type).base_model.model
    for found, expected, before in zip(outputs(reloaded, work), trained, untrained, strict=True):
        assert gap(found, expected) <= 1e-5
        assert not torch.allclose(expected, before, rtol=1e-3, atol=1e-4)


@pytest.fixture
def folder_of(tiny_bert, tiny_llama, tiny_t5):
    return lambda task: {"causal_lm": tiny_llama, "seq_2_seq_lm": tiny_t5}.get(task, tiny_bert)


@pytest.mark.parametrize(
    ("task", "init"),
    [*(("seq_cls", init) for init in INITS), *((task, "pissa") for task in TASKS if task != "seq_cls")],
)
def test_every_initialisation_survives_a_reload(task, init, folder_of, tmp_path):
    rank = ["lora.r=2"] if task == "question_ans" else []  # its head has two outputs, and pissa no more directions
    check_round_trip(task, folder_of(task), tmp_path, f"lora.init_lora_weights={init}", *rank)


@pytest.mark.parametrize(
    ("task", "option"),
    [
        *(("causal_lm", option) for option in OPTIONS),
        *((task, o) for task in TASKS if task != "causal_lm" for o in PLACES),
    ],
)
def test_every_option_survives_a_reload(task, option, folder_of, tmp_path):
    check_round_trip(task, folder_of(task), tmp_path, *OPTIONS[option])


def test_new_cross_attention_is_trained_and_saved(tiny_bert, tmp_path):
    """An encoder-decoder of two encoders: what its checkpoint lacks comes back with the adapter."""
    more = (f"model.decoder={tiny_bert}",)
    spec = compose.compose_trial(
        [
            "task_type=seq_2_seq_lm",
            f"model.pretrained={tiny_bert}",
            *more,
            "data.max_train_samples=48",
            "data.max_eval_samples=12",
            "train.max_steps=3",
            "train.learning_rate=1e-2",
            "train.batch_size=8",
        ]
    )
    work = workload.workload(spec)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    assert any("crossattention" in name for name in base.missing)
    todo = [engine.Job(0, spec)]
    for event in engine.Engine(base, work.task, work.prepared()).run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.TrialEnded):
            trained = evaluation.predict(
                event.attached.peft_model.base_model.model, work.task, work.examples["eval"], spec.train, 0
            )
            adapter.save(event.attached, tmp_path)
    fresh = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    reloaded = adapter.reload(tmp_path, fresh, spec.lora, spec.task_type).base_model.model
    again = evaluation.predict(reloaded, work.task, work.examples["eval"], spec.train, 0)
    assert [p["loss"] for p in again] == pytest.approx([p["loss"] for p in trained], rel=1e-5)

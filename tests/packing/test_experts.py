"""Mixture of experts: tiny random DeepSeek and Qwen models, whose experts are one 3-D tensor a layer."""

from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.models import wordpiece
from support.parity import Seen, passes, run

from lorasweep.config import compose
from lorasweep.lora import adapter, peft_config
from lorasweep.models import base_model
from lorasweep.packing import pass_cost
from lorasweep.runner import check
from lorasweep.training import engine, evaluation, workload

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def save(config_class, model_class, folder: Path, **more) -> Path:
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    torch.manual_seed(0)
    config = config_class(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **COMMON, **more)
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory) -> dict[str, Path]:
    deepseek = {
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_group": 1,
        "topk_group": 1,
    }
    qwen = {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return {
        "deepseek": save(
            transformers.DeepseekV2Config,
            transformers.DeepseekV2ForCausalLM,
            tmp_path_factory.mktemp("deepseek"),
            **deepseek,
        ),
        "qwen": save(
            transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM, tmp_path_factory.mktemp("qwen"), **qwen
        ),
    }


def trial(folder: Path, *more: str):
    spec = compose.compose_trial(
        [
            "task_type=causal_lm",
            f"model.pretrained={folder}",
            "data.max_train_samples=32",
            "data.max_eval_samples=8",
            "data.max_tokens=24",
            "train.max_steps=3",
            "train.learning_rate=1e-2",
            "train.batch_size=8",
            "lora.r=4",
            *more,
        ]
    )
    work = workload.workload(spec)
    return spec, work, lambda: base_model.load(spec.model, spec.train, work.task, work.tokenizer)


TARGETS = {
    "mlp": ["lora.target_modules=mlp"],
    "all": ["lora.target_modules=all"],
    "all-linear": ["lora.target_modules=all-linear"],
    "list": ["lora.target_modules=[q_proj,gate_proj,up_proj,down_proj]"],
    "parameters": [
        "lora.target_modules=[q_proj]",
        "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
    ],
}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("family", ["deepseek", "qwen"])
def test_experts_train_and_survive_a_reload(moe, family, targets, tmp_path):
    spec, work, load = trial(moe[family], *TARGETS[targets])
    assert peft_config.problems(spec.lora, spec.task_type, load()) == []
    base = load()
    start = {n: w.clone() for n, w in base.model.state_dict().items()}
    todo = [engine.Job(0, spec)]
    for event in engine.Engine(base, work.task, work.prepared()).run(lambda: todo.pop() if todo else None):
        if isinstance(event, engine.TrialBegan):
            found = adapter.counts(event.attached)
            assert (found.trainable, found.total) == event.attached.peft_model.get_nb_trainable_parameters()
            experts = [
                n for n, p in event.attached.peft_model.named_parameters() if ".experts." in n and p.requires_grad
            ]
            assert experts
        if isinstance(event, engine.TrialEnded):
            inner = event.attached.peft_model.base_model.model
            trained = evaluation.predict(inner, work.task, work.examples["eval"], spec.train, 0)
            adapter.save(event.attached, tmp_path)
    fresh = peft.PeftModel.from_pretrained(load().model, str(tmp_path)).eval().base_model.model
    again = evaluation.predict(fresh, work.task, work.examples["eval"], spec.train, 0)
    assert [p["loss"] for p in again] == pytest.approx([p["loss"] for p in trained], rel=1e-5)
    after = base.model.state_dict()
    assert after.keys() == start.keys()
    assert all(torch.equal(after[n], start[n]) for n in start)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("lora.lora_dropout=0.1", "lora_dropout"),
        ("lora.use_dora=true", "use_dora"),
        ("lora.init_lora_weights=pissa", "init_lora_weights=pissa"),
        ("lora.init_lora_weights=olora", "init_lora_weights=olora"),
        ("lora.init_lora_weights=orthogonal", "init_lora_weights=orthogonal"),
        ("lora.target_modules=[gate_proj]", "name both or neither"),
        ("lora.layers_to_transform=[0]", "experts of all layers"),
    ],
)
def test_what_experts_cannot_do_is_refused(moe, more, words):
    given = [] if "target_modules" in more else ["lora.target_modules=all"]
    spec, _, load = trial(moe["qwen"], more, *given)
    assert any(words in p for p in peft_config.problems(spec.lora, spec.task_type, load()))


def test_expert_parameters_by_name_are_checked_with_the_spec():
    with pytest.raises(compose.ConfigError, match="expert parameters cannot be combined with lora_dropout"):
        compose.compose_trial(["lora.target_parameters=[mlp.experts.down_proj]", "lora.lora_dropout=0.1"])


def test_attention_of_a_mixture_needs_no_exception(moe):
    spec, _, load = trial(moe["qwen"], "lora.target_modules=attention", "lora.lora_dropout=0.1")
    assert peft_config.problems(spec.lora, spec.task_type, load()) == []


BESIDE = ["lora.target_modules=attention", "train.seed=2", "lora.r=2", "lora.lora_dropout=0.2", "train.batch_size=5"]


@pytest.mark.parametrize(
    ("family", "targets", "more"),
    [
        ("deepseek", "list", []),
        ("deepseek", "parameters", []),
        ("deepseek", "attention", ["train.gradient_checkpointing=true"]),
        ("qwen", "list", ["train.gradient_checkpointing=true"]),
        ("qwen", "parameters", ["train.gradient_checkpointing=true"]),
        ("qwen", "attention", []),
    ],
)
def test_mixtures_pack_as_each_token_finds_its_own_experts(moe, family, targets, more, monkeypatch):
    """Two trials that adapt the experts, or the attention, and one with dropout on the attention: their losses and
    tensors are those of a run alone."""
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))
    own = TARGETS.get(targets, BESIDE[:1])
    rows = [[*own, "train.seed=1"], BESIDE, [*own, "train.seed=3", "lora.r=3", "train.batch_size=6"]]
    made = [trial(moe[family], "lora.init_lora_weights=false", *row, *more) for row in rows]
    specs, (_, work, load) = [spec for spec, _, _ in made], made[0]

    jobs = [engine.Job(i, spec) for i, spec in enumerate(specs)]

    def seen(some: list[engine.Job]) -> dict[int, Seen]:
        trainer = engine.Engine(load(), work.task, work.prepared())
        widths, found = passes(trainer), run(trainer, some, len(some))
        assert set(widths) == {len(some)}
        return found

    packed = seen(jobs)
    for job in jobs:
        solo = seen([job])[job.number]
        assert packed[job.number].losses == pytest.approx(solo.losses, rel=1e-4)
        assert packed[job.number].tensors.keys() == solo.tensors.keys()
        for name, tensor in solo.tensors.items():
            torch.testing.assert_close(packed[job.number].tensors[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("targets", ["mlp", "attention"])
def test_check_promises_a_mixture_what_it_will_have(moe, targets):
    spec, work, _ = trial(moe["qwen"], f"lora.target_modules={targets}")
    assert "trials in one pass" in check._shared(spec, work, check.plan(spec, work))

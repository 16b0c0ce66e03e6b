"""Adapters on a shared base: attach, count, save, detach, reload with plain peft."""

import json
from itertools import cycle

import peft
import pytest
import torch
from support.adapters import logits, move, prepared

from lorasweep.errors import ConfigError
from lorasweep.lora import adapter
from lorasweep.models import base_model, target_modules

INITS = ["true", "false", "gaussian", "olora", "pissa", "pissa_niter_4", "orthogonal", "loftq", "eva"]
STARTS_ELSEWHERE = ("false", "loftq")


@pytest.mark.parametrize(("init", "bias"), list(zip(INITS, cycle(["none", "lora_only", "all"]), strict=False)))
def test_saved_adapter_loads_with_plain_peft_and_the_base_is_left_as_it_was(tiny_bert, tmp_path, init, bias):
    spec, work, load = prepared(tiny_bert, f"lora.init_lora_weights={init}", f"lora.bias={bias}", "lora.r=4")
    base = load()
    base_model.renew_missing(base, spec.train.seed)
    start = {n: p.clone() for n, p in base.model.state_dict().items()}
    untrained = logits(base.model, work)
    batch = work.task.collate([work.examples["train"][:32]], work.tokenizer.pad_token_id)
    attached = adapter.attach(base, spec.lora, spec.task_type, spec.train.seed, lambda: [batch.inputs] * 4)
    if init not in STARTS_ELSEWHERE:
        torch.testing.assert_close(logits(attached.peft_model, work), untrained, rtol=1e-5, atol=1e-5)
    move(attached)
    trained = logits(attached.peft_model, work)
    assert (trained - untrained).abs().max() > 1e-3
    adapter.save(attached, tmp_path / "adapter")
    if init == "loftq":
        reloaded = adapter.reload(tmp_path / "adapter", load(), spec.lora, spec.task_type)
    else:
        reloaded = peft.PeftModel.from_pretrained(load().model, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(reloaded, work), trained, rtol=1e-5, atol=1e-5)
    adapter.detach(attached)
    after = base.model.state_dict()
    assert after.keys() == start.keys()
    assert all(torch.equal(after[n], start[n]) for n in start)
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_trials_that_change_base_weights_share_one_copy_of_them(tiny_bert, init, monkeypatch):
    """Also after one whose start failed."""
    spec, _, load = prepared(tiny_bert, f"lora.init_lora_weights={init}", "lora.r=4")
    base = load()
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in base.model.named_parameters()}
    made = []
    for seed in (1, 2):
        made.append(adapter.attach(base, spec.lora, spec.task_type, seed))
        made[-1].take_off()

    def broken(*args):
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(adapter, "get_peft_model_state_dict", broken)
        patched.setattr(adapter.module_swap, "own_weights", broken)
        with pytest.raises(MemoryError):
            adapter.attach(base, spec.lora, spec.task_type, 3)
    assert all(attached.originals for attached in made)
    for name, parameter in base.model.named_parameters():
        place, values = before[name]
        for attached in made:
            if name in attached.originals:
                assert attached.originals[name].data_ptr() == place and torch.equal(parameter, values), name


@pytest.mark.parametrize(
    ("kind", "preset", "bias"),
    [
        *(("seq_cls", preset, "none") for preset in ("all-linear", "attention", "mlp", "qv", "qkvo", "all")),
        *(("causal_lm", preset, "none") for preset in ("attention", "mlp", "qv", "qkvo", "all")),
        *((kind, "all-linear", "all") for kind in ("seq_cls", "causal_lm", "token_cls", "question_ans")),
        ("feature_extraction", "all-linear", "lora_only"),
    ],
)
def test_counts_equal_pefts(tiny_llama, tiny_bert, preset, kind, bias):
    folder = tiny_llama if kind == "causal_lm" else tiny_bert
    spec, _, load = prepared(folder, f"task_type={kind}", f"lora.target_modules={preset}", f"lora.bias={bias}")
    base = load()
    attached = adapter.attach(base, spec.lora, spec.task_type, 0)
    found = adapter.counts(attached)
    assert (found.trainable, found.total) == attached.peft_model.get_nb_trainable_parameters()
    assert found.lora > 0


def test_presets_name_the_modules_of_the_family(tiny_bert, tiny_llama):
    expected = {
        ("qv", tiny_llama): {"q_proj", "v_proj"},
        ("qkvo", tiny_llama): {"q_proj", "k_proj", "v_proj", "o_proj"},
        ("mlp", tiny_llama): {"gate_proj", "up_proj", "down_proj"},
        ("attention", tiny_bert): {"query", "key", "value", "attention.output.dense"},
        ("mlp", tiny_bert): {"intermediate.dense", "output.dense"},
    }
    for (preset, folder), names in expected.items():
        kind = "causal_lm" if folder == tiny_llama else "seq_cls"
        _, work, load = prepared(folder, f"task_type={kind}")
        base = load()
        found = target_modules.preset_names(base, work.task.head_names, preset)
        assert len(found) == 2 * len(names)
        assert all(any(f.endswith(n) for n in names) for f in found)


def test_adapter_that_names_a_module_to_import_is_refused(tmp_path):
    settings = {"peft_type": "LORA", "megatron_config": {"x": 1}, "megatron_core": "antigravity"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="asks peft to import 'antigravity'"):
        adapter.on(object(), tmp_path)

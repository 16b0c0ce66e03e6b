"""Initialisations on each kind of layer: right, or refused before anything trains."""

import subprocess
import sys

import pytest
import torch
import transformers
from support.models import wordpiece

from lorasweep.config import compose, registry
from lorasweep.config.spec import LoraSpec, ModelSpec, TaskSpec, TrainSpec
from lorasweep.errors import ConfigError
from lorasweep.lora import adapter, inits, loftq, peft_config
from lorasweep.models import base_model
from lorasweep.runner import check
from lorasweep.tasks.causal_lm import CausalLM

TASK = TaskSpec(name="CAUSAL_LM")
INPUTS = {"input_ids": torch.arange(5, 13)[None]}


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """Return the folder of a GPT-2, whose layers are Conv1D: weights [I, O] in place of [O, I]."""
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=1, n_head=4, n_positions=64)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loaded(folder, quantization="none"):
    spec = ModelSpec(pretrained=str(folder), quantization=quantization)
    train = TrainSpec(device="cpu", precision="fp32")
    return base_model.load(spec, train, CausalLM(TASK), base_model.load_tokenizer(spec))


def logits(model):
    with torch.no_grad():
        return model(**INPUTS).logits


@pytest.mark.parametrize("target", ["c_attn", "attn.c_proj"])
@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_of_full_rank_makes_up_for_all_that_rounding_a_conv1d_lost(tiny_gpt2, target, bits):
    base = loaded(tiny_gpt2)
    exact = {n: p.clone() for n, p in base.model.named_parameters()}
    lora = LoraSpec(r=64, lora_alpha=8, target_modules=[target], init_lora_weights="loftq", loftq_bits=bits)
    attached = adapter.attach(base, lora, TASK, 0)
    for name, layer in attached.peft_model.base_model.model.named_modules():
        if name.endswith(target):
            coarse, update = layer.get_base_layer().weight, layer.get_delta_weight("default")
            weight = exact[f"{name}.weight"]
            torch.testing.assert_close(coarse, loftq.rounded(weight.T, bits).T, msg="a scale a row of outputs")
            assert (coarse - weight).norm() > 1e-3 * weight.norm()
            torch.testing.assert_close(coarse + update, weight, rtol=1e-4, atol=1e-5)
    adapter.detach(attached)
    assert all(torch.equal(p, exact[n]) for n, p in base.model.named_parameters())


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4), ("int8", 8)])
def test_loftq_on_quantised_conv1d_starts_at_the_exact_model(tiny_gpt2, kind, bits):
    exact, base = logits(loaded(tiny_gpt2).model), loaded(tiny_gpt2, kind)
    plain = logits(base.model)
    targets = ["c_attn", "c_proj", "c_fc"]
    lora = LoraSpec(r=64, target_modules=targets, init_lora_weights="loftq", loftq_bits=bits)
    attached = adapter.attach(base, lora, TASK, 0)
    assert (logits(attached.peft_model) - exact).norm() < 0.01 * (plain - exact).norm()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "orthogonal", "gaussian", "loftq"])
def test_saved_adapter_of_conv1d_answers_as_the_trial_did(tiny_gpt2, tmp_path, init):
    base = loaded(tiny_gpt2)
    untrained = logits(base.model)
    lora = LoraSpec(r=4, target_modules=["c_attn", "attn.c_proj"], init_lora_weights=init)
    assert peft_config.problems(lora, TASK, base) == []
    attached = adapter.attach(base, lora, TASK, 0)
    started = logits(attached.peft_model)
    assert (started - untrained).norm() < (0.05 if init == "loftq" else 1e-5) * untrained.norm()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trained = logits(attached.peft_model)
    adapter.save(attached, tmp_path)
    torch.testing.assert_close(logits(adapter.reload(tmp_path, loaded(tiny_gpt2), lora, TASK)), trained)


REFUSED = {
    "olora on Conv1D": (dict(target_modules=["c_attn"], init_lora_weights="olora"), "'transformer.h.0.attn.c_attn'"),
    "pissa on an embedding": (dict(target_modules=["c_attn", "wte"], init_lora_weights="pissa"), "transformer.wte"),
    "orthogonal on an embedding": (dict(target_modules=["wpe"], init_lora_weights="orthogonal"), "transformer.wpe"),
    "eva on an embedding": (dict(target_modules=["wpe"], init_lora_weights="eva"), "transformer.wpe"),
    "more ranks than directions": (dict(target_modules=["c_attn"], init_lora_weights="pissa", r=65), "64 directions"),
    "by a pattern": (
        dict(target_modules=["c_attn", "c_fc"], init_lora_weights="pissa", rank_pattern={"c_fc": 128}),
        "rank 128",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_initialisation_without_a_start_for_a_layer_is_refused_before_training(tiny_gpt2, case):
    keys, word = REFUSED[case]
    found = peft_config.problems(LoraSpec(**keys), TASK, loaded(tiny_gpt2))
    assert any("lora.init_lora_weights" in p and word in p for p in found), found


def test_layer_that_is_not_linear_is_refused_for_what_looks_at_weights(tmp_path):
    tokenizer = wordpiece()
    config = transformers.NystromformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        conv_kernel_size=3,
        num_landmarks=4,
        segment_means_seq_len=4,
    )
    model = transformers.NystromformerForMaskedLM(config)
    base = base_model.Base(model, tokenizer, ())
    for init, problems in (("pissa", 1), ("loftq", 1), ("eva", 1), ("gaussian", 0)):
        lora = LoraSpec(target_modules=r".*(query|conv)", init_lora_weights=init)
        assert len(peft_config.problems(lora, TASK, base)) == problems


def test_embedding_beside_loftq_begins_plainly_as_no_base_quantises_it(tiny_gpt2):
    base = loaded(tiny_gpt2)
    table = base.model.transformer.wpe.weight.clone()
    lora = LoraSpec(r=64, target_modules=["c_attn", "wpe"], init_lora_weights="loftq", loftq_bits=8)
    assert peft_config.problems(lora, TASK, base) == []
    attached = adapter.attach(base, lora, TASK, 0)
    layer = attached.peft_model.base_model.model.transformer.wpe
    assert torch.equal(layer.get_base_layer().weight, table)
    assert not layer.get_delta_weight("default").any()


@pytest.fixture
def restored(monkeypatch):
    assert len(registry.INITS) > 1
    monkeypatch.setattr(registry.INITS, "_entries", dict(registry.INITS._entries))


def test_an_initialisation_is_one_entry(restored, tiny_gpt2, tmp_path):
    def finish(peft_model, lora, base, batches):
        for layer in adapter.lora_layers(peft_model):
            layer.lora_A["default"].weight.data.fill_(float(len(batches())))

    inits.add(
        inits.Init(
            name="counted",
            layers=frozenset({inits.LINEAR}),
            start="A holds the number of batches",
            sees=lambda lora: 3 * lora.r,
            sees_rule="3 * r",
            dora=False,
            problems=lambda lora: ["lora.r: counted needs r above 1"] if lora.r == 1 else [],
            in_peft=lambda lora: {"init_lora_weights": True},
            finish=finish,
        )
    )
    asked = ["lora.init_lora_weights=counted", "lora.target_modules=[lm_head]"]
    spec = compose.compose_trial(asked)
    assert check.start(spec) == "A holds the number of batches"
    with pytest.raises(ConfigError, match=r"lora\.r: counted needs r above 1") as refused:
        compose.compose_trial([*asked, "lora.r=1", "lora.use_dora=true", "lora.lora_bias=true"])
    assert len(refused.value.problems) == 4
    with pytest.raises(ConfigError, match=r"loftq, eva, counted, got 'countd'; did you mean 'counted'"):
        compose.compose_trial(["lora.init_lora_weights=countd"])

    base = loaded(tiny_gpt2)
    on_conv1d = LoraSpec(target_modules=["c_attn"], init_lora_weights="counted")
    assert "counted has no start for 'transformer.h.0.attn.c_attn'" in peft_config.problems(on_conv1d, TASK, base)[0]
    untrained = logits(base.model)
    attached = adapter.attach(base, spec.lora, TASK, 0, lambda: [INPUTS] * 5)
    assert {p.unique().item() for n, p in attached.named.items() if ".lora_A." in n} == {5.0}
    torch.testing.assert_close(logits(attached.peft_model), untrained)
    adapter.save(attached, tmp_path)
    adapter.detach(attached)
    torch.testing.assert_close(logits(adapter.reload(tmp_path, loaded(tiny_gpt2), spec.lora, TASK)), untrained)


@pytest.mark.parametrize("init", ["gaussian", "olora", "pissa_niter_4", "loftq", "eva"])
def test_a_bias_of_b_is_refused_where_peft_has_none(init):
    problems = LoraSpec(init_lora_weights=init, lora_bias=True).problems()
    assert problems == [f"lora.lora_bias: needs init_lora_weights=true or false, got {init}"]
    assert LoraSpec(lora_bias=True, use_dora=True).problems() == [
        "lora.lora_bias: peft has no bias of B with lora.use_dora; leave one of them out"
    ]


def test_names_of_initialisations_are_exact():
    able = [True, False, "gaussian", "olora", "pissa", "pissa_niter_16", "orthogonal", "loftq", "eva"]
    assert all(value in registry.INITS for value in able)
    unable = ["true", "True", "Gaussian", "pissa_niter_0", "pissa_niter_", "pissa_niter_N", "xpissa", "", 1, None]
    assert [value for value in unable if value in registry.INITS] == []


def test_settings_are_checked_without_torch():
    code = (
        "import sys; from lorasweep.config.compose import compose_trial\n"
        "compose_trial(['lora.init_lora_weights=eva', 'search.sampler=tpe', 'search.pruner=asha'])\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'peft', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

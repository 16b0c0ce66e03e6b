"""A quantised base: loaded as the keys say, shared by packed trials that end as alone, made up for by LoftQ."""

from dataclasses import replace

import pytest
import torch
from support import parity
from support.models import bert
from support.parity import DROPPED, EXACT, OPTIONS, PLAIN, alone, close, run, spec_of, trainer, workload_of
from torch import nn

from lorasweep.errors import ConfigError
from lorasweep.lora import adapter, peft_config
from lorasweep.memory import estimate, out_of_memory
from lorasweep.models import base_model, quantization
from lorasweep.runner import outcome, preflight
from lorasweep.training import engine
from lorasweep.training import workload as workload_module

pytestmark = pytest.mark.usefixtures("always_together")

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")

KINDS = ["nf4", "int8"]
REFUSED = (
    "pissa",
    "pissa_dropout",
    "olora",
    "dora_olora",
    "orthogonal",
    "modules_to_save",
    "save_a_block",
    "exact_loftq",
)
SOME = ("dropout", "bias_all", "embeddings", "dora")
PACKED = (*SOME, "lora_bias", "eva", "micro_batches", "recompute")
"""What touches the quantised layers or the passes over them; the rest is not told that the base is quantised."""


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory):
    """Return the folder of an encoder of width 64: narrower NF4 weights bitsandbytes reads wrongly on some CPUs, and
    peft's DoRA has it read them.
    """
    return bert(tmp_path_factory.mktemp("wide_bert"), 64)


def base_of(folder, kind: str, task: str = "seq_cls", *more: str) -> base_model.Base:
    spec, work = spec_of(task, folder, f"model.quantization={kind}", *more), workload_of(task, folder)
    return base_model.load(spec.model, spec.train, work.task, work.tokenizer)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantised_and_new_heads_and_embeddings_are_not(tiny_bert, tiny_llama, kind):
    base = base_of(tiny_bert, kind)
    modules = dict(base.model.named_modules())
    assert {type(modules[n]).__name__ for n in base.small} == {"Linear4bit" if kind == "nf4" else "Linear8bitLt"}
    assert "bert.encoder.layer.1.output.dense" in base.small and len(base.small) == 13
    assert type(modules["classifier"]) is nn.Linear and "classifier" in base.missing
    causal = base_of(tiny_llama, kind, "causal_lm")
    assert type(causal.model.lm_head) is nn.Linear and len(causal.small) == 14


def test_new_cross_attention_of_a_joined_decoder_is_not_quantised(tiny_bert):
    spec = spec_of("seq_2_seq_lm", tiny_bert, f"model.decoder={tiny_bert}", "model.quantization=nf4")
    work = workload_of("seq_2_seq_lm", tiny_bert, f"model.decoder={tiny_bert}")
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    assert any("crossattention" in n for n in base.missing)
    assert not [n for n in base.small if any(n.startswith(m) for m in base.missing)]
    assert any(n.startswith("decoder.") for n in base.small) and any(n.startswith("encoder.") for n in base.small)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_read_back_is_near_the_exact_one(tiny_bert, kind):
    base = base_of(tiny_bert, kind, "seq_cls", "model.double_quant=false")
    exact = base.exact()
    for name in base.small:
        layer = base.model.get_submodule(name)
        found = quantization.reader(layer)(torch.float32)
        if kind == "int8":
            expected = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        error = (found - exact[f"{name}.weight"]).norm() / exact[f"{name}.weight"].norm()
        assert (0.05 < error < 0.12) if kind == "nf4" else (0.001 < error < 0.01), (name, error)


def test_wide_weight_is_read_back_as_bitsandbytes_does():
    layer = bnb.nn.Linear4bit(128, 32, quant_type="nf4", compress_statistics=False).to("cpu")
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(quantization.reader(layer)(torch.float32), expected)


def test_double_quantisation_is_what_the_key_says(tiny_bert):
    states = {
        on: base_of(tiny_bert, "nf4", "seq_cls", f"model.double_quant={on}").model.bert.pooler.dense.weight.quant_state
        for on in ("true", "false")
    }
    assert (states["true"].nested, states["false"].nested) == (True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_product_and_its_input_gradient_are_those_of_the_weight_read_back(tiny_bert, kind):
    layer = base_of(tiny_bert, kind).model.bert.encoder.layer[0].intermediate.dense
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.weight.data, plain.bias.data = quantization.reader(layer)(torch.float32), layer.bias.data
    x = torch.randn(3, 5, layer.in_features)
    slopes = []
    for module in (layer, plain):
        own = x.clone().requires_grad_()
        y = module(own)
        y.square().sum().backward()
        slopes += [y.detach(), own.grad]
    torch.testing.assert_close(slopes[0], slopes[2])
    torch.testing.assert_close(slopes[1], slopes[3])


def test_row_of_an_int8_layer_does_not_depend_on_outliers_of_another(tiny_bert):
    """LLM.int8() itself takes the columns of large inputs out of the product, for all rows of the batch."""
    layer = base_of(tiny_bert, "int8").model.bert.encoder.layer[0].intermediate.dense
    x = torch.randn(2, layer.in_features)
    alone_ = layer(x[:1])
    x[1] *= 1000
    torch.testing.assert_close(layer(x)[:1], alone_, rtol=1e-5, atol=1e-6)


# --- trials on it ----------------------------------------------------------------------------------------------------


@pytest.fixture
def double(monkeypatch):
    """Compute and train in double precision; the quantised weights are read back in it."""
    single, attach = torch.Tensor.float, adapter.attach

    def attached_in_double(base, *args):
        for parameter in base.model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32)
        attached = attach(base, *args)
        for parameter in attached.peft_model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.double()
        for weight in attached.swap.weights:
            weight.base.data = weight.base.data.double()
        return attached

    monkeypatch.setattr(parity, "precision", "double, quantised")
    monkeypatch.setattr(adapter, "attach", attached_in_double)
    monkeypatch.setattr(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t))


@pytest.mark.parametrize(("option", "kind"), [(o, "nf4") for o in PACKED] + [(o, "int8") for o in SOME])
def test_packed_trials_share_a_quantised_base_and_equal_solo_ones(tiny_bert, wide_bert, double, option, kind):
    folder, more = wide_bert if "dora" in option else tiny_bert, (f"model.quantization={kind}",)
    trials = [OPTIONS[option], PLAIN, DROPPED]
    specs = [spec_of("seq_cls", folder, *one, *more) for one in trials]
    work = workload_of("seq_cls", folder)
    made = trainer(specs[0], work)
    small = {n: made.base.model.get_submodule(n).weight for n in made.base.small}
    before = {n: w.data.clone() for n, w in small.items()}
    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 3)
    assert made.limits.most == out_of_memory.MOST_SLOTS, "they did not share their passes"
    for i, spec in enumerate(specs):
        close(found[i], alone(spec, work, i), EXACT)
    for name, weight in small.items():
        assert torch.equal(made.base.model.get_submodule(name).weight.data, before[name]), weight


@pytest.mark.parametrize("kind", KINDS)
def test_language_model_trains_on_a_quantised_bf16_base(tiny_llama, kind):
    more = (f"model.quantization={kind}", "train.precision=bf16")
    specs = [spec_of("causal_lm", tiny_llama, *one, *more) for one in (("train.max_steps=8",), PLAIN)]
    work = workload_of("causal_lm", tiny_llama)
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 2)
    exact = alone(spec_of("causal_lm", tiny_llama, "train.max_steps=8"), work)
    assert found[0].losses == pytest.approx(exact.losses, rel=0.05)
    assert found[0].metrics[-1]["loss"] < found[0].losses[0]
    assert {t.dtype for t in found[0].tensors.values()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["plain", "loftq", "bias_all", "dora"])
def test_saved_adapter_scores_the_same_on_the_base_quantised_again(tiny_bert, wide_bert, tmp_path, option, kind):
    own = OPTIONS.get(option, ("lora.init_lora_weights=loftq", f"lora.loftq_bits={quantization.BITS[kind]}"))
    folder = wide_bert if option == "dora" else tiny_bert
    spec, work = spec_of("seq_cls", folder, *own, f"model.quantization={kind}"), workload_of("seq_cls", folder)
    made, jobs = trainer(spec, work), [engine.Job(0, spec)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.TrialEnded):
            adapter.save(event.attached, tmp_path)
            found = outcome.reload(tmp_path, spec, event.kept, work, made, "accuracy")
            assert found.same, found
            unquantised = replace(spec, model=replace(spec.model, quantization="none"))
            other = outcome.reload(tmp_path, unquantised, event.kept, work, made, "accuracy")
            assert other.loss_relative_difference > 3 * found.loss_relative_difference


def test_dora_on_rows_that_a_cpu_reads_wrongly_is_refused_before_anything_trains(tiny_bert, monkeypatch):
    monkeypatch.setattr(quantization, "misreads", lambda width: width == 32)
    keys = ("lora.use_dora=true", "model.quantization=nf4")
    words = r"lora\.use_dora: bitsandbytes reads the NF4 weights of 'bert\..*' wrongly on this CPU, in rows of 32"
    with pytest.raises(ConfigError, match=words):
        preflight.preflight([spec_of("seq_cls", tiny_bert, *keys, "lora.target_modules=qv")])
    for other in ("lora.use_dora=false", "model.quantization=int8", "model.quantization=none"):
        preflight.preflight([spec_of("seq_cls", tiny_bert, *keys, other)])
    spec, work = spec_of("seq_cls", tiny_bert, *keys), workload_of("seq_cls", tiny_bert)
    base = base_model.skeleton(spec.model, work.task, work.tokenizer)
    wanted = peft_config.config(spec.lora, spec.task_type, base)
    assert peft_config.misread(wanted, base, torch.device("cuda")) == []
    monkeypatch.setattr(quantization, "misreads", lambda width: False)
    assert peft_config.misread(wanted, base, torch.device("cpu")) == []


def test_wrong_reading_is_found_by_trying_it(monkeypatch):
    quantization.misreads.cache_clear()
    read = bnb.functional.dequantize_4bit
    wrong = lambda stored, state: read(stored, state) * (1.5 if state.shape[-1] == 32 else 1.0)  # noqa: E731
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", wrong)
    assert quantization.misreads(32) and not quantization.misreads(128)
    quantization.misreads.cache_clear()


# --- LoftQ -----------------------------------------------------------------------------------------------------------


def outputs(net, work) -> torch.Tensor:
    batch = work.task.collate([work.examples["eval"]], work.tokenizer.pad_token_id)
    with torch.no_grad():
        return net(**batch.inputs).last_hidden_state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [4, 32])
def test_loftq_starts_nearer_to_the_exact_base_whatever_alpha_is(tiny_bert, kind, alpha):
    more = ("lora.r=16", f"lora.lora_alpha={alpha}", "lora.init_lora_weights=loftq")
    spec = spec_of(
        "seq_cls", tiny_bert, *more, f"lora.loftq_bits={quantization.BITS[kind]}", f"model.quantization={kind}"
    )
    work, base = workload_of("seq_cls", tiny_bert), base_of(tiny_bert, kind)
    exact = base_model.load(replace(spec.model, quantization="none"), spec.train, work.task, work.tokenizer).model.bert
    expected, plain = outputs(exact, work), outputs(base.model.bert, work)
    attached = adapter.attach(base, spec.lora, spec.task_type, 0)
    started = outputs(attached.peft_model.base_model.model.bert, work)
    adapter.detach(attached)
    assert (started - expected).norm() < 0.7 * (plain - expected).norm()
    assert torch.equal(outputs(base.model.bert, work), plain), "the shared base is as it was"


def test_two_loftq_trials_share_a_quantised_base_and_a_pass(tiny_bert):
    more = ("lora.init_lora_weights=loftq", "model.quantization=nf4", "train.max_steps=2")
    specs = [spec_of("seq_cls", tiny_bert, *more, f"lora.r={r}") for r in (2, 8)]
    work = workload_of("seq_cls", tiny_bert)
    made, together = trainer(specs[0], work), []

    def act(event):
        together.append(len(made.slots))

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2, act)
    assert max(together) == 2
    for i, spec in enumerate(specs):
        assert found[i].losses == pytest.approx(alone(spec, work, i).losses, rel=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("lora.init_lora_weights=pissa",), "lora.init_lora_weights: pissa takes"),
        (("lora.init_lora_weights=olora",), "lora.init_lora_weights: olora takes"),
        (("lora.init_lora_weights=orthogonal",), "lora.init_lora_weights: peft draws orthogonal"),
        (("lora.init_lora_weights=loftq", "lora.loftq_bits=8"), "lora.loftq_bits: must be 4"),
        (("lora.init_lora_weights=loftq", "lora.loftq_iter=3"), "lora.loftq_iter: must be 1"),
        (("lora.modules_to_save=[pooler]",), "'pooler' holds 'bert.pooler.dense'"),
        (("lora.modules_to_save=[layer.1.output.dense]",), "keeps in 4 bits"),
    ],
)
def test_what_a_quantised_base_cannot_do_is_refused_before_it_trains(tiny_bert, more, words):
    spec, work = spec_of("seq_cls", tiny_bert, "model.quantization=nf4", *more), workload_of("seq_cls", tiny_bert)
    for base in (base_model.skeleton(spec.model, work.task, work.tokenizer), base_of(tiny_bert, "nf4")):
        assert any(words in p for p in peft_config.problems(spec.lora, spec.task_type, base)), base.small
    if "modules_to_save" not in more[0]:
        with pytest.raises(ConfigError, match=words.split(":")[0]):
            adapter.attach(base, spec.lora, spec.task_type, 0)
    free = spec_of("seq_cls", tiny_bert, *more)
    assert (
        peft_config.problems(free.lora, free.task_type, base_model.skeleton(free.model, work.task, work.tokenizer))
        == []
    )


@pytest.mark.parametrize("kind", KINDS)
def test_skeleton_knows_what_will_be_quantised(tiny_bert, tiny_llama, kind):
    for folder, task in ((tiny_bert, "seq_cls"), (tiny_llama, "causal_lm"), (tiny_bert, "token_cls")):
        spec, work = spec_of(task, folder, f"model.quantization={kind}"), workload_of(task, folder)
        assert base_model.skeleton(spec.model, work.task, work.tokenizer).small == base_of(folder, kind, task).small


def test_missing_bitsandbytes_is_told(tiny_bert, monkeypatch):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install lorasweep\[quant\]"):
        base_of(tiny_bert, "nf4")


@pytest.mark.parametrize(
    ("keys", "lacks"),
    [
        (["model.quantization=int8"], "model.quantization: int8"),
        (["lora.init_lora_weights=loftq"], "lora.init_lora_weights: loftq"),
        (["train.optimizer=adamw_8bit"], "train.optimizer: adamw_8bit"),
        (["lora.init_lora_weights=loftq", "lora.loftq_bits=8"], ""),
    ],
)
def test_any_point_that_needs_missing_bitsandbytes_is_refused_before_one_trains(tiny_bert, monkeypatch, keys, lacks):
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    points = [spec_of("seq_cls", tiny_bert), spec_of("seq_cls", tiny_bert, *keys)]
    if not lacks:
        preflight.preflight(points)
        return
    with pytest.raises(ConfigError) as refused:
        preflight.preflight(points)
    assert refused.value.problems == [f"{lacks} needs bitsandbytes; run `pip install lorasweep[quant]`"]


def test_groups_of_another_quantisation_are_apart(tiny_bert):
    kinds = ("none", "nf4", "int8")
    keys = {workload_module.key(spec_of("seq_cls", tiny_bert, f"model.quantization={k}")) for k in kinds}
    keys.add(workload_module.key(spec_of("seq_cls", tiny_bert, "model.quantization=nf4", "model.double_quant=false")))
    assert len(keys) == 4


def test_read_back_model_is_ordinary_and_computes_the_same(tiny_bert):
    base, work = base_of(tiny_bert, "nf4"), workload_of("seq_cls", tiny_bert)
    before = outputs(base.model.bert, work)
    quantization.read_back(base.model)
    assert not quantization.quantised(base.model) and torch.equal(outputs(base.model.bert, work), before)


@pytest.mark.parametrize("more", [("nf4",), ("nf4", "model.double_quant=false"), ("int8",)])
def test_estimate_counts_the_weights_as_they_will_be_kept(tiny_llama, more):
    keys = (f"model.quantization={more[0]}", *more[1:])
    spec, work = spec_of("causal_lm", tiny_llama, *keys), workload_of("causal_lm", tiny_llama)
    found = estimate.estimate(spec, work.task, work.tokenizer, work.examples).parts["weights"] * 2**30
    base = base_of(tiny_llama, more[0], "causal_lm", *more[1:])
    kept = sum(p.numel() * p.element_size() for p in {*base.model.parameters(), *base.model.buffers()})
    for name in base.small:
        weight = base.model.get_submodule(name).weight
        state = getattr(weight, "quant_state", None)
        kept += 4 * len(weight.SCB) if state is None else state.absmax.numel() * state.absmax.element_size()
        kept += state.state2.absmax.numel() * 4 if state is not None and state.nested else 0
    assert found == pytest.approx(kept, rel=0.02)

"""A base in bf16 or fp16: what trains stays in fp32, packed trials equal solo ones, and what is saved comes back."""

import math
import re
import time

import pytest
import torch
from support.parity import DROPPED, OPTIONS, PLAIN, alone, run, spec_of, trainer, workload_of

from lorasweep.config.spec import ModelSpec, TrainSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware import device, matmul_peak
from lorasweep.lora import adapter, module_swap
from lorasweep.memory import out_of_memory
from lorasweep.runner import outcome, preflight
from lorasweep.training import engine
from lorasweep.training.loss_scale import START, LossScale

pytestmark = pytest.mark.usefixtures("always_together")

SOME = ("dropout", "bias_all", "modules_to_save", "pissa", "dora")
OWN_TENSORS = ("embeddings", "lora_bias", "eva", "exact_loftq", "parameters")
"""Options that make tensors of their own, whose format could be the wrong one."""

BF16 = "train.precision=bf16"
EPS = 2.0**-8
"""Relative rounding of bf16."""


def norm_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))


@pytest.mark.parametrize(
    ("option", "precision"), [(o, "bf16") for o in (*SOME, *OWN_TENSORS)] + [(o, "fp16") for o in SOME]
)
def test_what_trains_is_fp32_and_packed_equals_solo_to_rounding(tiny_bert, option, precision):
    """One step: later ones start from weights that rounding has moved apart."""
    more = (f"train.precision={precision}", "train.max_steps=1")
    specs = [spec_of("seq_cls", tiny_bert, *one, *more) for one in (OPTIONS[option], PLAIN, DROPPED)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)
    before = {n: w.clone() for n, w in made.base.model.state_dict().items() if not n.startswith(made.base.missing)}
    assert all(w.dtype == device.FORMATS[precision] for w in before.values() if w.is_floating_point())

    def act(event):
        if isinstance(event, engine.TrialBegan):
            assert {p.dtype for p in event.attached.parameters()} == {torch.float32}
        if isinstance(event, engine.StepEvent):
            (slot,) = [s for s in made.slots if s.number == event.number]
            moments = [v for s in slot.optimizer.state.values() for v in s.values()]
            assert moments and {m.dtype for m in moments} == {torch.float32}

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 3, act)
    assert made.limits.most == out_of_memory.MOST_SLOTS, "they did not share their passes"
    for i, spec in enumerate(specs):
        expected = alone(spec, work, i)
        assert found[i].losses == pytest.approx(expected.losses, rel=4 * EPS)
        for name, slope in expected.gradients[0].items():
            assert slope.dtype == found[i].gradients[0][name].dtype == torch.float32
            assert norm_gap(found[i].gradients[0][name], slope) < 16 * EPS, name
    after = made.base.model.state_dict()
    assert all(torch.equal(after[n], w) for n, w in before.items())


@pytest.mark.parametrize("task", ["causal_lm", "token_cls", "question_ans", "seq_2_seq_lm", "feature_extraction"])
def test_every_task_trains_on_a_bf16_base(tiny_bert, tiny_llama, task):
    folder = tiny_llama if task == "causal_lm" else tiny_bert
    more = [f"model.decoder={tiny_bert}"] if task == "seq_2_seq_lm" else []
    specs = [spec_of(task, folder, *more, *one, BF16) for one in (("lora.lora_dropout=0.1",), PLAIN)]
    work = workload_of(task, folder, *more)
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 2)
    exact = alone(spec_of(task, folder, *more, *PLAIN), work, 1)
    assert [s.state for s in found.values()] == ["COMPLETE"] * 2
    assert found[1].losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.parametrize("option", ["plain", "bias_all", "modules_to_save", "pissa", "dora", "embeddings", "lora_bias"])
def test_saved_adapter_of_a_bf16_base_scores_the_same_when_loaded(tiny_bert, tmp_path, option):
    spec, work = spec_of("seq_cls", tiny_bert, *OPTIONS[option], BF16), workload_of("seq_cls", tiny_bert)
    made, jobs = trainer(spec, work), [engine.Job(0, spec)]
    for event in made.run(lambda: jobs.pop() if jobs else None):
        if isinstance(event, engine.EvalEvent):
            last = event
        if isinstance(event, engine.TrialEnded):
            adapter.save(event.attached, tmp_path)
            found = outcome.reload(tmp_path, spec, last, work, made, "accuracy")
            assert found.same, found
            assert {w.dtype for w in adapter.tensors(event.attached).values()} == {torch.float32}


def test_trained_bias_is_taken_off_with_the_forward_that_rounds_it(tiny_bert):
    spec, work = spec_of("seq_cls", tiny_bert, "lora.bias=all", BF16), workload_of("seq_cls", tiny_bert)
    base = trainer(spec, work).base
    norm = base.model.bert.embeddings.LayerNorm
    attached = adapter.attach(base, spec.lora, spec.task_type, 0)
    assert norm.bias.dtype == torch.float32 and "forward" in vars(norm)
    attached.take_off()
    assert norm.bias.dtype == torch.bfloat16 and "forward" not in vars(norm)
    attached.put_on()
    assert norm.bias.dtype == torch.float32 and "forward" in vars(norm)
    adapter.detach(attached)


def test_module_kept_in_fp32_computes_in_its_old_format():
    module = torch.nn.Linear(8, 8).to(torch.bfloat16)
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    expected = module(x)
    module_swap.keep_in_fp32(module)
    assert module.weight.dtype == torch.float32 and torch.equal(module(x), expected)
    module(x).float().sum().backward()
    assert module.weight.grad.dtype == torch.float32


# --- fp16's loss scale -----------------------------------------------------------------------------------------------


def test_scale_halves_on_overflow_and_grows_after_good_steps(monkeypatch):
    monkeypatch.setattr("lorasweep.training.loss_scale.GROW_AFTER", 3)
    scale, weight = LossScale(), torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, math.inf])
    assert not scale.unscale([weight]) and scale.value == START / 2
    for step in range(3):
        weight.grad = torch.full((2,), scale.value)
        assert scale.unscale([weight])
        assert weight.grad.tolist() == [1.0, 1.0], step
    assert scale.value == START


def test_overflow_of_one_trial_is_done_again_and_leaves_its_neighbour_alone(tiny_bert):
    specs = [spec_of("seq_cls", tiny_bert, *one, "train.precision=fp16") for one in ((), PLAIN)]
    work = workload_of("seq_cls", tiny_bert)
    expected = [run(trainer(s, work), [engine.Job(i, s)], 1)[i] for i, s in enumerate(specs)]
    made, scales = trainer(specs[0], work), []

    def act(event):
        if isinstance(event, engine.TrialBegan) and event.number == 0:
            made.slots[-1].scale.value = 2.0**40
        if isinstance(event, engine.StepEvent):
            scales.append({s.number: s.scale.value for s in made.slots})

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2, act)
    assert scales[0][0] < 2.0**40 and {s[1] for s in scales} == {START}
    for i in (0, 1):
        assert len(found[i].losses) == specs[i].train.max_steps and found[i].losses == pytest.approx(
            expected[i].losses, rel=0.01
        )


def test_gradient_that_no_scale_helps_ends_its_trial_alone(tiny_bert):
    specs = [spec_of("seq_cls", tiny_bert, *one, "train.precision=fp16") for one in ((), PLAIN)]
    work = workload_of("seq_cls", tiny_bert)
    made = trainer(specs[0], work)

    def act(event):
        if isinstance(event, engine.StepEvent) and (event.number, event.step) == (1, 2):
            (slot,) = [s for s in made.slots if s.number == 1]
            with torch.no_grad():
                slot.attached.parameters()[0].fill_(float("nan"))

    found = run(made, [engine.Job(i, s) for i, s in enumerate(specs)], 2, act)
    assert (found[0].state, found[1].state, found[1].steps) == ("COMPLETE", "PRUNED", 2)


def test_scale_goes_on_from_a_checkpoint(tiny_bert, tmp_path):
    spec = spec_of("seq_cls", tiny_bert, "train.precision=fp16")
    made, jobs = trainer(spec, workload_of("seq_cls", tiny_bert)), [engine.Job(0, spec)]
    events = made.run(lambda: jobs.pop() if jobs else None)
    for event in events:
        if isinstance(event, engine.StepEvent) and event.step == 2:
            made.slots[0].scale.value = 77.0
            made.checkpoint(0, tmp_path / "a.pt", {})
            events.close()
    jobs = [engine.Job(0, spec, checkpoint=tmp_path / "a.pt")]
    events = made.run(lambda: jobs.pop() if jobs else None)
    next(events)
    assert made.slots[0].scale.value == 77.0 and made.slots[0].scale.good == 2


# --- which format, which kernel --------------------------------------------------------------------------------------


def gpu(monkeypatch, bf16: bool) -> torch.device:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Old Card")
    return torch.device("cuda", 0)


def test_auto_is_bf16_on_a_gpu_that_has_it_and_fp32_elsewhere(monkeypatch):
    auto = TrainSpec()
    assert device.dtype_of(auto, torch.device("cpu")) == device.dtype_of(auto, torch.device("mps")) == torch.float32
    assert device.dtype_of(auto, gpu(monkeypatch, bf16=True)) == torch.bfloat16
    assert device.dtype_of(auto, gpu(monkeypatch, bf16=False)) == torch.float32
    with pytest.raises(ConfigError, match="Old Card has no bf16; use fp16 or fp32"):
        device.dtype_of(TrainSpec(precision="bf16"), gpu(monkeypatch, bf16=False))


def test_auto_attention_is_flash_only_where_it_is_installed_and_runs(monkeypatch):
    card, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    assert device.attention(ModelSpec(), card, torch.bfloat16) is None
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert device.attention(ModelSpec(), card, torch.bfloat16) == "flash_attention_2"
    assert device.attention(ModelSpec(), card, torch.float32) is None
    assert device.attention(ModelSpec(), cpu, torch.bfloat16) is None
    assert device.attention(ModelSpec(attn_implementation="eager"), card, torch.bfloat16) == "eager"


def test_flash_attention_that_cannot_run_is_refused_with_what_lacks(tiny_bert, monkeypatch):
    card, flash = torch.device("cuda"), ModelSpec(attn_implementation="flash_attention_2")
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: name == "flash_attn")
    assert device.attention(flash, card, torch.float16) == "flash_attention_2"
    with pytest.raises(ConfigError, match=r"attn_implementation: .* here is float32 on the cuda; use auto or sdpa"):
        device.attention(flash, card, torch.float32)
    monkeypatch.setattr(device.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"flash_attn is not installed; use auto or sdpa"):
        device.attention(flash, card, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"attn_implementation: .* here is float32 on the cpu"):
        preflight.preflight([spec_of("seq_cls", tiny_bert, "model.attn_implementation=flash_attention_2")])


def test_slow_format_of_a_cpu_is_measured_with_a_small_product_and_told(monkeypatch):
    """Half precision can be hundreds of times slower: a product of the full size would take seconds."""
    sizes: list[int] = []

    def mm(a, b):
        sizes.append(len(a))
        time.sleep(0.02 if a.dtype == torch.bfloat16 else 1e-4)

    monkeypatch.setattr(matmul_peak, "_measured", matmul_peak._measured.__wrapped__)  # nothing is known yet
    monkeypatch.setattr(matmul_peak.torch, "mm", mm)
    cpu = torch.device("cpu")
    assert matmul_peak.matmul_peak(cpu, torch.float32) > 0 and max(sizes) == matmul_peak.SIZE
    sizes.clear()
    told = re.fullmatch(r"products in bfloat16 take (\d+) times as long as .*", matmul_peak.slow(cpu, torch.bfloat16))
    assert told and int(told[1]) > 1000, "the same seconds, for a product of 64 times the work at the most"
    assert set(sizes[matmul_peak.TRIES + 1 :]) == {matmul_peak.SMALL}
    assert matmul_peak.slow(cpu, torch.float32) == matmul_peak.slow(torch.device("cuda"), torch.bfloat16) == ""

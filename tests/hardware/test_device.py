"""Determinism bit for bit, the switches behind it, and which GPU is whose: on the CPU, with a faked card."""

import os
import tempfile
import types

import accelerate
import pytest
import torch
from support.parity import DROPPED, PLAIN, Seen, run, spec_of, trainer, workload_of

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.config.spec import TrainSpec
from lorasweep.errors import ConfigError
from lorasweep.hardware import container, device
from lorasweep.models import base_model, quantization
from lorasweep.packing import dropout
from lorasweep.runner import plan, preflight
from lorasweep.runner.request import Request
from lorasweep.training import engine

SAME = "train.deterministic=true"


@pytest.fixture(autouse=True)
def switches_as_before():
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def twice(folder, width: int, trials) -> list[dict[int, Seen]]:
    specs = [spec_of("seq_cls", folder, *one, SAME) for one in trials]
    work = workload_of("seq_cls", folder)
    return [run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], width) for _ in range(2)]


@pytest.mark.parametrize("width", [1, 3])
def test_two_deterministic_runs_are_equal_bit_for_bit(tiny_bert, width):
    first, second = twice(tiny_bert, width, [DROPPED, PLAIN, ("lora.bias=all", "lora.lora_dropout=0.1")])
    for i, seen in first.items():
        assert seen.losses == second[i].losses and seen.metrics == second[i].metrics
        assert all(torch.equal(t, second[i].tensors[n]) for n, t in seen.tensors.items())


def test_deterministic_trials_let_no_clock_choose_their_company(tiny_bert, monkeypatch):
    monkeypatch.setattr("lorasweep.packing.pass_cost.overhead", lambda *a: pytest.fail("a clock was asked"))
    for more, width in (((), 1), (("train.slots=3",), 3)):
        spec = spec_of("seq_cls", tiny_bert, SAME, *more)
        made, jobs = trainer(spec, workload_of("seq_cls", tiny_bert)), [engine.Job(i, spec) for i in range(3)]
        for _ in made.run(lambda jobs=jobs: jobs.pop() if jobs else None):
            pass
        assert made.width == width and made._comparison is None and made.passes.overhead == float("inf")


def test_switch_of_torch_follows_the_trial(tiny_bert):
    trainer(spec_of("seq_cls", tiny_bert, SAME), workload_of("seq_cls", tiny_bert))
    assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
    trainer(spec_of("seq_cls", tiny_bert), workload_of("seq_cls", tiny_bert))
    assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic


def test_cublas_is_told_before_its_first_product_whether_that_trial_is_deterministic_or_not(monkeypatch):
    """To ask a card for bf16 begins CUDA: that alone must not refuse determinism."""
    card = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(device.WORKSPACE, "")  # so that it is as before afterwards
    for first in (True, False):
        monkeypatch.delenv(device.WORKSPACE)
        device.set_up(TrainSpec(deterministic=first), card)
        assert os.environ[device.WORKSPACE] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled() == first
    device.set_up(TrainSpec(deterministic=True), card)
    assert torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "high"
    monkeypatch.setenv(device.WORKSPACE, ":16:8")
    device.set_up(TrainSpec(deterministic=True), card)
    assert os.environ[device.WORKSPACE] == ":16:8", "a user's own stays"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
def test_two_deterministic_runs_on_a_gpu_are_equal_bit_for_bit(tiny_llama):
    spec = spec_of("causal_lm", tiny_llama, SAME, "train.device=cuda", "lora.lora_dropout=0.1")
    work = workload_of("causal_lm", tiny_llama)
    first, second = (run(trainer(spec, work), [engine.Job(0, spec)], 1)[0] for _ in range(2))
    assert first.losses == second.losses


# --- several GPUs ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cards(monkeypatch, tmp_path) -> list[int]:
    """Fake two GPUs; return the devices that were set."""
    taken: list[int] = []
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(uuid=f"card-{d}"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    return taken


def test_each_worker_takes_a_gpu_of_its_own_and_leaves_it_at_the_end(two_cards):
    with device.own(3):
        with device.own(3), device.own(3):
            assert two_cards == [0, 1], "the third one has no GPU to itself"
        with device.own(3):
            assert two_cards == [0, 1, 1]
    with device.own(3):
        assert two_cards == [0, 1, 1, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_workers_of_a_cpu_divide_its_threads_unless_the_user_has(monkeypatch):
    threads = [8]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    with device.own(3) as divides:
        assert divides and threads == [8, 2]
    assert not device.divide_threads(3) and threads == [8, 2]
    assert device.divide_threads(1) and threads == [8, 2, 8]
    with device.own(1) as divides:
        assert not divides
    with device.own(3, divide=False) as divides:
        assert not divides and threads == [8, 2, 8]
    assert not container.threads_are_given()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert container.threads_are_given()


def test_worker_of_a_spread_base_takes_no_gpu_to_itself_and_is_the_only_one(two_cards):
    with device.own(1, every=True):
        assert two_cards == []
    with pytest.raises(ConfigError, match=r"search\.workers: must be 1 with model\.device_map, got 2"):
        device.own(2, every=True).__enter__()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_device_that_is_not_there_is_refused_with_those_that_are_and_why(monkeypatch):
    with pytest.raises(ConfigError, match=r"train\.device: must be auto or what this machine has \(cpu.*got cuda; "):
        device.device_of(TrainSpec(device="cuda"))
    for built, hidden, words in (
        (False, None, "is built without CUDA"),
        (True, None, "sees no GPU$"),
        (True, "", "sees no GPU, CUDA_VISIBLE_DEVICES=$"),
    ):
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda built=built: built)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if hidden is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        with pytest.raises(ConfigError, match=words):
            device.device_of(TrainSpec(device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_machine_that_only_launches_need_not_have_what_its_workers_have(tiny_bert, tmp_path):
    own = [f"model.pretrained={tiny_bert}", "data.max_train_samples=40", "data.max_eval_samples=6"]
    own += [f"outputs={tmp_path}", "train.device=cuda", "train.optimizer=paged_adamw", "search.max_memory_gib=80"]
    for far in ("hydra/launcher=submitit_slurm", "hydra.launcher.ray.init.address=host:6379"):
        assert len(plan.plan(Request.of([*own, far])).queue) == 1
    for near in ((), ("hydra/launcher=submitit_local",)):
        with pytest.raises(ConfigError, match=r"train\.device: must be auto or what this machine has"):
            plan.plan(Request.of([*own, *near]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["search.workers=2"], "search.workers: must be 1 with model.device_map, got 2; one trains on all GPUs"),
        (
            ["task_type=seq_2_seq_lm", "model.decoder=x"],
            "model.device_map: must be null for a model joined with model.decoder, got auto",
        ),
    ],
)
def test_what_a_spread_base_cannot_do_is_refused_before_a_study_is_made(tmp_path, capsys, overrides, words):
    assert main.main(["model.device_map=auto", f"outputs={tmp_path}", *overrides]) == 1
    assert words in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.device=gpu0", "train.device: must be one of auto, cpu, cuda, mps, got 'gpu0'"),
        ("train.precision=32", "train.precision: must be one of auto, fp32, bf16, fp16, got 32"),
        ("model.quantization=null", "model.quantization: must be one of none, int8, nf4, got null"),
        (
            "model.quantization=nf3",
            "model.quantization: must be one of none, int8, nf4, got 'nf3'; did you mean 'nf4'?",
        ),
        ("model.device_map=foo", "model.device_map: must be one of auto, balanced or null, got 'foo'"),
        ("model.device_map=0", "model.device_map: must be one of auto, balanced or null, got 0"),
        ("train.deterministic=null", "train.deterministic: must be true or false, got null"),
    ],
)
def test_wrong_value_is_answered_with_the_right_ones_once(override, words):
    with pytest.raises(ConfigError) as refused:
        compose.compose_trial([override])
    assert refused.value.problems == [words]


def test_base_that_the_gpus_do_not_hold_is_refused():
    base_model.check_placed({"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1})
    with pytest.raises(ConfigError, match=r"1 of 2 parts are left over \(model\.layers\.1, \.\.\.\)"):
        base_model.check_placed({"model.layers.0": 0, "model.layers.1": "disk"})


@pytest.mark.parametrize("where", ["auto", "balanced"])
def test_spread_base_gets_accelerates_map_on_gpus_and_stays_as_it_is_on_a_cpu(tiny_llama, monkeypatch, where):
    spec, work = spec_of("causal_lm", tiny_llama, f"model.device_map={where}"), workload_of("causal_lm", tiny_llama)
    given: list[dict] = []
    loaded = base_model._loaded
    monkeypatch.setattr(base_model, "_loaded", lambda *a, **k: given.append(k) or loaded(*a, **k))
    base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    assert "device_map" not in given[0]
    monkeypatch.setattr(base_model, "device_of", lambda train: torch.device("cuda"))
    monkeypatch.setattr(base_model, "dtype_of", lambda train, device: torch.float32)
    monkeypatch.setattr(base_model, "set_up", lambda train, device: None)
    with pytest.raises(ConfigError, match=r"model\.device_map: the GPUs do not hold the base"):
        base_model.load(spec.model, spec.train, work.task, work.tokenizer)  # there is only the CPU to put it on
    assert given[1]["device_map"] == where


def test_packed_trials_train_through_accelerates_hooks_as_without_them(tiny_llama, monkeypatch):
    """The hooks move inputs from device to device; here all of them are the CPU."""
    monkeypatch.setattr("lorasweep.packing.pass_cost.overhead", lambda *a: float("inf"))
    specs = [spec_of("causal_lm", tiny_llama, *one) for one in (DROPPED, PLAIN)]
    work = workload_of("causal_lm", tiny_llama)
    jobs = [engine.Job(i, s) for i, s in enumerate(specs)]
    expected, spread = run(trainer(specs[0], work), jobs, 2), trainer(specs[0], work)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
    places = dict.fromkeys(parts, "cpu")
    accelerate.dispatch_model(spread.base.model, places, main_device="cpu", force_hooks=True)
    assert hasattr(spread.base.model.model.layers[1], "_hf_hook")
    found = run(spread, jobs, 2)
    for i in (0, 1):
        assert found[i].losses == pytest.approx(expected[i].losses, rel=1e-6) and found[i].state == "COMPLETE"


def test_dropout_of_each_device_is_a_stream_of_its_own():
    stream = dropout.DropoutStream(torch.device("cpu"))
    like = torch.empty(64, 3)
    stream.at(1, 2)
    first = stream.keep(like, 0.5)
    other = torch.device("cpu", 1)  # as good as another one to a generator
    stream.draws[other] = dropout.Draws(other, 0)
    stream.at(1, 2)
    assert torch.equal(stream.keep(like, 0.5), first)
    stream.at(1, 2)
    assert not torch.equal(stream.draws[other].numbers(9), stream.draws[torch.device("cpu")].numbers(9))


# --- optimisers ------------------------------------------------------------------------------------------------------


def test_paged_optimiser_is_refused_without_a_gpu_and_8_bits_train_anywhere(tiny_bert):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")
    paged = spec_of("seq_cls", tiny_bert, "train.optimizer=paged_adamw_8bit")
    assert quantization.lacking(paged, torch.device("cpu")) == [
        "train.optimizer: paged_adamw_8bit pages GPU memory, there is none on the cpu; use adamw or adamw_8bit"
    ]
    assert quantization.lacking(paged, torch.device("cuda")) == []
    work, exact = workload_of("seq_cls", tiny_bert), spec_of("seq_cls", tiny_bert, "lora.r=128")
    spec = spec_of("seq_cls", tiny_bert, "lora.r=128", "train.optimizer=adamw_8bit")
    made, kinds = trainer(spec, work), set()

    def act(event):
        if isinstance(event, engine.StepEvent):
            kinds.update(v.dtype for s in made.slots[0].optimizer.state.values() for v in s.values() if is_moment(v))

    found = run(made, [engine.Job(0, spec)], 1, act)[0]
    expected = run(trainer(exact, work), [engine.Job(0, exact)], 1)[0]
    assert torch.uint8 in kinds and found.losses == pytest.approx(expected.losses, rel=0.05)


def test_paged_point_of_a_grid_is_refused_before_the_others_train(tiny_bert):
    """Both share a base: the second is looked at too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")
    points = [spec_of("seq_cls", tiny_bert, f"train.optimizer={o}") for o in ("adamw", "paged_adamw")]
    with pytest.raises(ConfigError, match=r"train\.optimizer: paged_adamw pages GPU memory"):
        preflight.preflight(points)


def is_moment(value) -> bool:
    return isinstance(value, torch.Tensor) and value.numel() >= 4096


def test_8_bit_optimiser_goes_on_from_a_checkpoint(tiny_bert, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra `quant`)")
    spec = spec_of("seq_cls", tiny_bert, "lora.r=128", "train.optimizer=adamw_8bit")
    work = workload_of("seq_cls", tiny_bert)
    whole, made, jobs = (
        run(trainer(spec, work), [engine.Job(0, spec)], 1)[0],
        trainer(spec, work),
        [engine.Job(0, spec)],
    )
    events = made.run(lambda: jobs.pop() if jobs else None)
    for event in events:
        if isinstance(event, engine.StepEvent) and event.step == 2:
            made.checkpoint(0, tmp_path / "a.pt", {})
            events.close()
    rest = run(trainer(spec, work), [engine.Job(0, spec, checkpoint=tmp_path / "a.pt")], 1)[0]
    assert rest.losses == pytest.approx(whole.losses[2:], rel=1e-6)

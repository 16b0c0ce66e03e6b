"""What a trial will need is what it then takes, and its own code is what is counted."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lorasweep.cli import main
from lorasweep.config import compose
from lorasweep.config.spec import TrialSpec
from lorasweep.memory import estimate
from lorasweep.memory.meter import META, Meter
from lorasweep.models import base_model
from lorasweep.packing import packed_pass, pass_cost
from lorasweep.runner import check, rehearsal
from lorasweep.training import engine, workload

SMALL = ["model.decoder=null", "data.max_train_samples=60", "data.max_eval_samples=6"]
SMALL += ["data.max_tokens=32", "train.batch_size=8", "lora.lora_dropout=0.1", "tracking.reload_check=false"]


BYTES = (torch.int8, torch.uint8)


def made(task: str, folder: Path, *more: str) -> tuple:
    spec = compose.compose_trial([f"task_type={task}", f"model.pretrained={folder}", *SMALL, *more])
    return spec, workload.workload(spec)


def estimated(spec, work: workload.Workload, **more) -> estimate.Estimate:
    return estimate.estimate(spec, work.task, work.tokenizer, work.examples, **more)


def highest(profiler) -> int:
    now = peak = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


TRIES = 6
"""The profiler loses its events now and then: what it saw counts where two tries agree."""


def measured(spec, work: workload.Workload, slots: int) -> int:
    """Return the bytes of the weights and the highest sum of what the engine allocates beside them in two steps."""
    full = [e for e in work.examples["train"] if len(e) == spec.data.max_tokens]
    work.examples["train"] = full
    seen: list[int] = []
    for _ in range(TRIES):
        weights, beside, trained = _measured(spec, work, slots)
        found = weights + beside
        if beside >= trained and any(found == pytest.approx(other, rel=0.05) for other in seen):
            return found
        seen.append(found)
    pytest.fail(f"no two tries of the profiler agree: {seen} bytes")


def _measured(spec, work: workload.Workload, slots: int) -> tuple[int, int, int]:
    """Return bytes of the weights, of what the profiler saw beside them, and of what trains."""
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    made = engine.Engine(base, work.task, work.prepared())
    made.traits.first_token = None  # the estimate, made without the weights, counts all tokens
    made.width = slots
    jobs = [engine.Job(i, spec) for i in range(slots)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        events = made.run(lambda: jobs.pop() if jobs else None)
        for event in events:
            if isinstance(event, engine.StepEvent) and event.step == 2:
                break
        trained = sum(p.nbytes for slot in made.slots for p in slot.attached.parameters())
        events.close()
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in [*base.model.parameters(), *base.model.buffers()]}
    return sum(weights.values()), highest(profiler), trained


@pytest.mark.parametrize(
    ("task", "more", "slots"),
    [
        ("seq_cls", (), 1),
        ("seq_cls", (), 3),
        ("seq_cls", ("train.micro_batch_size=4",), 3),
        ("seq_cls", ("lora.use_dora=true",), 3),
        ("causal_lm", (), 1),
        ("seq_2_seq_lm", ("data.max_target_tokens=32",), 1),
        ("token_cls", ("lora.bias=all",), 3),
        ("seq_cls", ("lora.r=128", "train.optimizer=adamw_8bit"), 1),
        ("seq_cls", ("lora.init_lora_weights=pissa", "lora.target_modules=all-linear"), 3),
        ("causal_lm", ("lora.init_lora_weights=olora",), 1),
        ("seq_cls", ("lora.init_lora_weights=loftq", "lora.loftq_bits=8"), 1),
        ("causal_lm", ("lora.init_lora_weights=loftq", "model.quantization=nf4"), 3),
        ("causal_lm", ("model.quantization=nf4",), 1),
        ("causal_lm", ("model.quantization=int8", "train.gradient_checkpointing=true"), 1),
    ],
)
def test_estimate_is_what_a_trial_takes(tiny_bert, tiny_llama, tiny_t5, monkeypatch, task, more, slots):
    monkeypatch.setattr(estimate, "_known", {})
    if any("8bit" in key or "quantization" in key for key in more):
        pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    folder = {"causal_lm": tiny_llama, "seq_2_seq_lm": tiny_t5}.get(task, tiny_bert)
    spec, work = made(task, folder, *more)
    expected = measured(spec, work, slots)
    found = estimated(spec, work, slots=slots)
    assert found.counted
    starts = any("init_lora_weights" in key for key in more)  # what these begin with may take more than training
    most = max(found.phases[phase] for phase in ("training", *["start"] * starts))
    assert most * 2**30 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("more", "own_bytes", "each"),
    [
        (("lora.init_lora_weights=pissa",), 2**30, 1),
        (("lora.init_lora_weights=pissa",), 0, 0),
        (("lora.init_lora_weights=olora", "lora.use_dora=true"), 0, 1),
        (("lora.init_lora_weights=loftq", "lora.loftq_bits=8"), 0, 1),
    ],
)
def test_weights_that_trials_in_a_pass_keep_are_counted(tiny_bert, monkeypatch, more, own_bytes, each):
    """Layers that peft itself computes cannot do without."""
    monkeypatch.setattr(packed_pass, "OWN_BYTES", own_bytes)
    monkeypatch.setattr(estimate, "_known", {})
    (plain, work), (spec, _) = (made("seq_cls", tiny_bert, "lora.target_modules=[query]", *m) for m in ((), more))
    weights = [estimated(s, work, slots=3).parts["weights"] * 2**30 for s in (plain, spec)]
    assert weights[1] - weights[0] == pytest.approx(3 * each * 2 * 32 * 32 * 4)


def test_loftq_and_pissa_have_estimates_of_their_own(tiny_bert, monkeypatch):
    """Of large weights LoftQ's are kept in slots, PiSSA's are not: what is known of one does not serve the other."""
    monkeypatch.setattr(packed_pass, "OWN_BYTES", 0)
    monkeypatch.setattr(estimate, "_known", {})
    inits = (("lora.init_lora_weights=pissa",), ("lora.init_lora_weights=loftq", "lora.loftq_bits=8"))
    pissa, loftq = (estimated(*made("seq_cls", tiny_bert, *m), slots=3).parts["weights"] for m in inits)
    assert loftq > pissa


def test_meter_counts_what_is_alive():
    with Meter(words=7) as meter:
        x = torch.empty(10, 5, device=META)
        y = x @ torch.empty(5, 7, device=META)
        z = x * 2
        del z
        w = x + 1
    assert meter.now == {"activations": 4 * 100, "logits": 4 * 70}  # the matrix of 35 is gone
    assert meter.peak.total() == 4 * (50 + 70 + 50)
    assert (y.shape, w.shape) == ((10, 7), (10, 5))


def test_masks_with_data_stay_and_choose_places():
    with Meter():
        x = torch.empty(3, 4, 2, device=META)
        mask = torch.tensor([[True, False, True, True]] * 3).to(META)
        assert mask.sum() == 9, "a copy to the meta device keeps its data"
        assert x[mask].shape == (9, 2)
        assert (x.sum(-1) * mask).device == META


def test_parts_and_phases_add_up(tiny_bert):
    spec, work = made("seq_cls", tiny_bert, "train.micro_batch_size=4", "tracking.reload_check=true")
    one, four = estimated(spec, work), estimated(spec, work, slots=4)
    assert sum(one.parts.values()) == pytest.approx(one.phases["training"])
    assert one.gib == max(one.phases.values()) and set(one.phases) == {"start", "training", "evaluation", "reload"}
    assert one.phases["reload"] == pytest.approx(one.phases["evaluation"] + one.parts["weights"])
    for part in ("adapters", "optimizer"):
        assert four.parts[part] == pytest.approx(4 * one.parts[part])
    assert one.parts["optimizer"] == pytest.approx(2 * one.parts["gradients"])
    assert one.parts["adapters"] == pytest.approx(2 * one.parts["gradients"]), "the best so far is kept beside it"
    last, _ = made("seq_cls", tiny_bert, "train.micro_batch_size=4", "train.keep=last")
    assert estimated(last, work).parts["adapters"] == pytest.approx(one.parts["gradients"])
    assert four.parts["activations"] > 3 * one.parts["activations"]


def test_solo_estimate_does_not_know_of_slots(tiny_bert):
    spec, work = made("seq_cls", tiny_bert, "train.slots=8")
    found = estimated(spec, work)
    alone = estimate.solo_gib(spec, work.task, work.tokenizer, work.examples)
    assert alone == max(found.phases["training"], found.phases["evaluation"])


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("train.batch_size=4", "train.batch_size=8"),
        ("train.micro_batch_size=2", "train.micro_batch_size=4"),
        ("lora.target_modules=[value]", "lora.target_modules=all-linear"),
        ("lora.r=2", "lora.r=32"),
        ("lora.lora_dropout=0", "lora.lora_dropout=0.5"),
        ("lora.init_lora_weights=true", "lora.init_lora_weights=pissa"),
        ("train.precision=bf16", "train.precision=fp32"),
        ("data.max_tokens=16", "data.max_tokens=32"),
    ],
)
def test_estimate_grows_with(tiny_bert, less, more):
    (small, small_work), (large, large_work) = (made("seq_cls", tiny_bert, o) for o in (less, more))
    assert estimated(small, small_work).gib < estimated(large, large_work).gib


def test_model_that_looks_at_values_is_estimated_by_its_linear_layers(tiny_bert, monkeypatch):
    spec, work = made("seq_cls", tiny_bert, "lora.r=3")
    exact = estimated(spec, work)
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda m, x: forward(m, x) if x.sum() >= 0 else x)
    monkeypatch.setattr(estimate, "_known", {})
    found = estimated(spec, work)
    assert exact.counted and not found.counted
    assert 0.5 * exact.gib < found.gib < 1.5 * exact.gib


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_base_is_counted_as_it_is_stored(tiny_bert, kind):
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    spec, work = made("seq_cls", tiny_bert, f"model.quantization={kind}", "model.double_quant=false")
    found = estimated(spec, work).parts["weights"] * 2**30
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    held = [*base.model.parameters(), *base.model.buffers()]
    scales = sum(4 * (len(w) if kind == "int8" else w.numel() * 2 // 64) for w in held if w.dtype in BYTES)
    assert found == pytest.approx(sum(w.nbytes for w in held) + scales, rel=0.02)


def test_quantised_weights_are_spared_once_in_every_phase(tiny_llama):
    pytest.importorskip("bitsandbytes", reason="the extra quant is not installed")
    plain, small = (
        estimated(*made("causal_lm", tiny_llama, f"model.quantization={kind}", "tracking.reload_check=true"))
        for kind in ("none", "int8")
    )
    spared = plain.parts["weights"] - small.parts["weights"]
    spec, work = made("causal_lm", tiny_llama, "model.quantization=int8")
    base = base_model.skeleton(spec.model, work.task, work.tokenizer)
    sizes = [base.model.get_submodule(n).weight for n in base.small]
    assert spared * 2**30 == sum(3 * w.numel() - 4 * len(w) for w in sizes)
    assert plain.phases["start"] - small.phases["start"] == pytest.approx(spared)
    read = max(w.nbytes for w in sizes) / 2**30
    assert plain.phases["evaluation"] - small.phases["evaluation"] == pytest.approx(spared - read)


# --- kept states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["seq_cls", "causal_lm", "seq_2_seq_lm"])
def test_kept_states_are_counted_as_the_examples_fill_them(tiny_bert, tiny_llama, tiny_t5, task):
    folder = {"causal_lm": tiny_llama, "seq_2_seq_lm": tiny_t5}.get(task, tiny_bert)
    targets = ("lora.target_modules=qv",) if task == "seq_2_seq_lm" else ("lora.layers_to_transform=[1]",)
    layer = r".*encoder\.block\.1\..*\.q" if task == "seq_2_seq_lm" else None
    more = (f"lora.target_modules='{layer}'",) if layer else targets
    spec, work = made(task, folder, *more, "train.epochs=1")
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    trainer, jobs = engine.Engine(base, work.task, work.prepared()), [engine.Job(0, spec)]
    for _ in trainer.run(lambda: jobs.pop() if jobs else None):
        pass
    store = trainer.prefix.store
    sizes = {key: (t := store.get(key)).numel() * t.element_size() for key in store._places}
    assert sizes
    assert estimated(spec, work).kept * 2**30 == pytest.approx(sum(sizes.values()), rel=0.02)


def test_kept_states_end_at_their_budget_and_count_where_they_lie(tiny_bert, monkeypatch):
    layer = "lora.layers_to_transform=[1]"
    whole = estimated(*made("seq_cls", tiny_bert, layer))
    few = estimated(*made("seq_cls", tiny_bert, layer, "train.max_steps=1"))
    less, none = (
        estimated(*made("seq_cls", tiny_bert, layer, f"train.prefix_cache_gib={gib}")) for gib in (whole.kept / 2, 0)
    )
    assert 0 < few.kept < whole.kept and less.kept == pytest.approx(whole.kept / 2, rel=1e-3) and none.kept == 0
    assert whole.parts["kept states"] == whole.kept and sum(whole.parts.values()) == whole.phases["training"]
    assert whole.phases["evaluation"] - none.phases["evaluation"] == pytest.approx(whole.kept)
    for off in ("model.base_dropout=true", "train.deterministic=true", "lora.layers_to_transform=[0]"):
        assert estimated(*made("seq_cls", tiny_bert, layer, off)).kept == 0
    spec, work = made("seq_cls", tiny_bert, layer)
    monkeypatch.setattr(estimate, "_known", {})
    monkeypatch.setattr(estimate, "device_of", lambda train: torch.device("cuda"))
    monkeypatch.setattr(estimate, "dtype_of", lambda train, device: torch.float32)
    card = estimated(spec, work)
    assert card.kept == whole.kept and card.parts["kept states"] == 0, "a GPU's memory holds none of them"


def test_check_tells_of_kept_states(tiny_bert, capsys):
    for more, words in (
        ((), "no states of frozen layers"),
        (("lora.layers_to_transform=[1]",), "counted above), at most train.prefix_cache_gib=1"),
    ):
        check.show(*made("seq_cls", tiny_bert, *more))
        (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("kept:")]
        assert words in line


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "GiB with at most 8 trials in one pass (start"),
        (("train.slots=3",), "GiB with 3 trials in one pass (start"),
        (("train.slots=1",), "one trial a pass (train.slots=1)"),
        (("train.deterministic=true",), "one trial a pass (train.deterministic=true)"),
    ],
)
def test_check_tells_what_shared_passes_need(tiny_bert, capsys, more, words):
    check.show(*made("seq_cls", tiny_bert, *more))
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("in slots:")]
    assert words in line
    assert ("each beyond the first adds" in line and "activations" in line) == ("GiB" in words)


@pytest.mark.parametrize(("beside", "expected"), [(2.5, 3), (0.5, 1), (-9, 1), (1000, pass_cost.MOST)])
def test_auto_takes_no_more_slots_than_there_is_room_for(tiny_bert, monkeypatch, beside, expected):
    """With room for one trial and so many more."""
    spec, work = made("seq_cls", tiny_bert)
    base = base_model.load(spec.model, spec.train, work.task, work.tokenizer)
    one, two = (estimated(spec, work, slots=n, missing=base.missing) for n in (1, 2))
    free = one.gib + beside * (two.gib - one.gib) - one.parts["weights"]
    monkeypatch.setattr(estimate, "free_gib", lambda device: free)
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))
    trainer, jobs = engine.Engine(base, work.task, work.prepared()), [engine.Job(0, spec)]
    events = trainer.run(lambda: jobs.pop() if jobs else None)
    while not isinstance(next(events), engine.StepEvent):
        pass
    events.close()
    assert trainer.width == expected


def test_check_prints_the_estimate(tiny_bert, capsys):
    spec, work = made("seq_cls", tiny_bert, "train.slots=4")
    check.show(spec, work)
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "training: weights" in lines["memory"] and "GiB are free on the" in lines["memory"]
    assert "with 4 trials in one pass" in lines["in slots"]
    assert "GiB at the most for one trial" in lines["memory"]


# --- search.max_memory_gib -------------------------------------------------------------------------------------------


STUDY = ["tracking=none", "study=s", "train.max_steps=2", *(o for o in SMALL if "batch_size" not in o)]


def results(folder: Path) -> list[dict]:
    found = sorted(folder.glob("*/result.json"), key=lambda p: int(p.parent.name))
    return [json.loads(p.read_text()) for p in found]


def between(folder: Path, *overrides: str) -> float:
    """Return GiB between the needs of two settings."""
    needs = [estimated(*made("seq_cls", folder, o)).gib for o in overrides]
    return sum(needs) / 2


def test_points_over_the_limit_are_never_begun(tiny_bert, tmp_path, monkeypatch, capsys):
    limit = between(tiny_bert, "train.batch_size=4", "train.batch_size=32")
    begun: list[int] = []
    tried: list[TrialSpec] = []
    monkeypatch.setattr(rehearsal, "rehearse", lambda specs, *_: tried.extend(specs) or [])
    admit = engine.Engine._admit
    monkeypatch.setattr(
        engine.Engine, "_admit", lambda s, job: begun.append(job.spec.train.batch_size) or admit(s, job)
    )
    own = [f"model.pretrained={tiny_bert}", *STUDY, f"outputs={tmp_path}", f"search.max_memory_gib={limit}"]
    assert main.main(["-m", "train.batch_size=32,4", *own]) == 0
    out = capsys.readouterr().out
    assert begun == [s.train.batch_size for s in tried] == [4]
    assert out.index("point 0 (train.batch_size=32) needs about") < out.index("study s: 2 trials")
    assert "1 was never begun: more memory than search.max_memory_gib allows." in out
    first, second = results(tmp_path / "s")
    assert (first["state"], second["state"]) == ("PRUNED", "COMPLETE")
    assert "needs about" in first["reason"] and "never begun" in first["reason"] and "metric" not in first


@pytest.mark.parametrize("more", [[], ["search.sampler=tpe", "search.trials=4"]])
def test_check_tells_which_points_would_never_begin(tiny_bert, capsys, more):
    limit = between(tiny_bert, "train.batch_size=4", "train.batch_size=32")
    own = [f"model.pretrained={tiny_bert}", *STUDY, f"search.max_memory_gib={limit}", *more]
    assert main.main(["check", "-m", "train.batch_size=32,4", *own]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "never begun" in line]
    assert len(told) == 1 and told[0].startswith("point 0 (train.batch_size=32) needs about")


def test_sampled_trials_over_the_limit_end_without_loading(tiny_bert, tmp_path, monkeypatch, capsys):
    limit = between(tiny_bert, "train.batch_size=4", "train.batch_size=32")
    loaded: list[int] = []
    load = base_model.load
    monkeypatch.setattr(base_model, "load", lambda *a: loaded.append(a[1].batch_size) or load(*a))
    own = [f"model.pretrained={tiny_bert}", *STUDY, f"outputs={tmp_path}", f"search.max_memory_gib={limit}"]
    own += ["search.sampler=tpe", "search.trials=6", "search.startup_trials=2"]
    assert main.main(["-m", "train.batch_size=4,32", "lora.lora_alpha=4,8,16", *own]) == 0
    found = results(tmp_path / "s")
    states = {r["state"]: [f for f in found if f["state"] == r["state"]] for r in found}
    assert set(states) == {"PRUNED", "COMPLETE"} and len(found) == 6
    assert all(r["params_swept"]["train.batch_size"] == 32 for r in states["PRUNED"])
    assert set(loaded) == {4}
    assert f"Of 6 trials {len(states['PRUNED'])} were pruned" in (out := capsys.readouterr().out)
    assert f"{len(states['PRUNED'])} were never begun: more memory" in out


def test_limit_that_leaves_no_trial_is_refused_before_anything_is_written(tiny_bert, tmp_path, capsys):
    own = [f"model.pretrained={tiny_bert}", *STUDY, f"outputs={tmp_path}", "search.max_memory_gib=0.0001"]
    assert main.main(["-m", "lora.r=2,4", *own]) == 1
    told = capsys.readouterr()
    assert "search.max_memory_gib: no trial is left; point 1 (lora.r=4) needs about" in told.out + told.err
    assert not (tmp_path / "s").exists()


def test_micro_batches_that_divide_themselves_are_judged_by_one_row(tiny_bert):
    limit = between(tiny_bert, "train.batch_size=4", "train.batch_size=32")
    for micro, words in (("null", "more than search.max_memory_gib"), ("auto", "")):
        more = ("train.batch_size=32", f"train.micro_batch_size={micro}", f"search.max_memory_gib={limit}")
        spec, work = made("seq_cls", tiny_bert, *more)
        why = estimate.hopeless(spec, work.task, work.tokenizer, work.examples)
        assert words in why and bool(words) == bool(why)


def test_rank_in_between_needs_no_pass_of_its_own(tiny_bert, monkeypatch):
    """From the third rank on memory is read off a straight line, and is what a count gives."""
    monkeypatch.setattr(estimate, "_by_rank", {})
    spec, work = made("seq_cls", tiny_bert)
    at = {r: replace(spec, lora=replace(spec.lora, r=r)) for r in (4, 64, 24, 128)}
    given = work.task, work.tokenizer, work.examples
    direct = {r: estimate.estimate(one, *given).phases for r, one in at.items()}
    passes = []
    counted = estimate._estimate
    monkeypatch.setattr(estimate, "_estimate", lambda *args: passes.append(args) or counted(*args))
    monkeypatch.setattr(estimate, "_known", {})
    found = {r: estimate.solo_gib(one, *given) for r, one in at.items()}
    assert len(passes) == 2
    for r, gib in found.items():
        assert gib == pytest.approx(max(direct[r][name] for name in estimate.SOLO), rel=0.01)

"""A trial that keeps only its layers' inputs has the same losses and gradients, with less memory."""

import pytest
import torch
from support.parity import DROPPED, EXACT, OPTIONS, PLAIN, SMALL, alone, close, run, spec_of, trainer, workload_of

from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.memory import estimate
from lorasweep.models import base_model
from lorasweep.packing import gradient_checkpointing
from lorasweep.runner import preflight
from lorasweep.training import engine

pytestmark = pytest.mark.usefixtures("always_together")

ON = ("train.gradient_checkpointing=true",)
SOME = ["plain", "dropout", "bias_all", "lora_bias", "embeddings", "pissa_dropout", "dora", "micro_batches"]


@pytest.mark.parametrize("option", [*SOME, "save_a_block", "eva"])
def test_solo_trial_has_the_same_gradients(tiny_bert, double, option):
    own, work = OPTIONS[option], workload_of("seq_cls", tiny_bert)
    close(
        alone(spec_of("seq_cls", tiny_bert, *own, *ON), work), alone(spec_of("seq_cls", tiny_bert, *own), work), EXACT
    )


@pytest.mark.parametrize("option", [*SOME, "modules_to_save"])
def test_packed_trials_have_the_gradients_of_solo_ones_that_keep_all(tiny_bert, double, option):
    own, work = OPTIONS[option], workload_of("seq_cls", tiny_bert)
    trials = [(*own, *ON), PLAIN, (*own, "train.seed=3"), DROPPED]
    specs = [spec_of("seq_cls", tiny_bert, *one) for one in trials]
    without = [spec_of("seq_cls", tiny_bert, *(o for o in one if o not in ON)) for one in trials]
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 4)
    for i, spec in enumerate(without):
        close(found[i], alone(spec, work, i), EXACT)


@pytest.mark.parametrize("task", ["causal_lm", "token_cls", "question_ans", "seq_2_seq_lm", "feature_extraction"])
def test_every_task_computes_again(tiny_bert, tiny_llama, tiny_t5, double, task):
    folder = {"causal_lm": tiny_llama, "seq_2_seq_lm": tiny_t5}.get(task, tiny_bert)
    work = workload_of(task, folder)
    specs = [spec_of(task, folder, *one) for one in ((*DROPPED, *ON), (*PLAIN, "lora.lora_dropout=0.2"))]
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 2)
    for i, one in enumerate((DROPPED, (*PLAIN, "lora.lora_dropout=0.2"))):
        close(found[i], alone(spec_of(task, folder, *one), work, i), EXACT)


def test_whole_layer_trained_by_one_trial_computes_again_for_it_alone(tiny_bert, double):
    """Its rows go through a layer of its own, the others' through the base's."""
    own = ("lora.target_modules=[query]", "lora.modules_to_save=[encoder.layer.1]", "lora.lora_dropout=0.2")
    work = workload_of("seq_cls", tiny_bert)
    specs = [spec_of("seq_cls", tiny_bert, *one, *ON) for one in (own, DROPPED, PLAIN)]
    found = run(trainer(specs[0], work), [engine.Job(i, s) for i, s in enumerate(specs)], 3)
    for i, one in enumerate((own, DROPPED, PLAIN)):
        close(found[i], alone(spec_of("seq_cls", tiny_bert, *one), work, i), EXACT)


def test_dropout_of_the_base_comes_out_the_same(tiny_bert):
    more, work = ("model.base_dropout=true", "lora.lora_dropout=0.2"), workload_of("seq_cls", tiny_bert)

    def losses(*own: str) -> list[float]:
        torch.manual_seed(5)
        return alone(spec_of("seq_cls", tiny_bert, *more, *own), work).losses

    assert losses(*ON) == pytest.approx(losses(), rel=1e-5)


@pytest.mark.parametrize("slots", [1, 3])
def test_estimate_tells_of_the_memory_that_is_spared(tiny_bert, slots):
    """Of two layers one is there at a time, and both inputs."""
    gib = []
    for own in ((), ON):
        spec, work = spec_of("seq_cls", tiny_bert, "lora.lora_dropout=0.1", *own), workload_of("seq_cls", tiny_bert)
        found = estimate.estimate(spec, work.task, work.tokenizer, work.examples, slots=slots)
        assert found.counted
        gib.append(found.parts["activations"])
    assert gib[1] < 0.75 * gib[0]


@pytest.mark.parametrize("slots", [1, 3])
def test_layers_compute_twice_and_keep_less(tiny_bert, slots):
    """Counted in the engine itself: calls of a layer's attention, and bytes saved for the backward pass."""
    calls, kept = [], []
    for own in ((), ON):
        spec, work = spec_of("seq_cls", tiny_bert, "lora.lora_dropout=0.1", *own), workload_of("seq_cls", tiny_bert)
        made, sizes, seen = trainer(spec, work), {}, []
        made.base.model.bert.encoder.layer[1].attention.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        frozen = {p.data_ptr() for p in made.base.model.parameters()}
        forward = made.task.row_losses

        def row_losses(net, batch, forward=forward, sizes=sizes, frozen=frozen):
            def pack(tensor):
                if tensor.untyped_storage().data_ptr() not in frozen:
                    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                return forward(net, batch)

        made.task.row_losses = row_losses
        made.width, jobs = slots, [engine.Job(i, spec) for i in range(slots)]
        events = made.run(lambda jobs=jobs: jobs.pop() if jobs else None)
        try:
            next(e for e in events if isinstance(e, engine.StepEvent))
        finally:
            events.close()
            del made.task.row_losses
        calls.append(len(seen))
        kept.append(sum(sizes.values()))
    assert calls == [1, 2]
    assert kept[1] < 0.5 * kept[0], kept


def test_model_without_such_layers_is_refused_before_training(tiny_bert, monkeypatch):
    spec = spec_of("seq_cls", tiny_bert, *ON)
    monkeypatch.setattr(gradient_checkpointing, "blocks", lambda _: [])
    with pytest.raises(ConfigError, match="BertForSequenceClassification marks no layer"):
        preflight.preflight([spec])


def test_layers_are_as_before_afterwards(tiny_bert):
    spec = compose.compose_trial(["task_type=seq_cls", f"model.pretrained={tiny_bert}", *SMALL])
    work = workload_of("seq_cls", tiny_bert)
    base = base_model.skeleton(spec.model, work.task, work.tokenizer).model
    found = gradient_checkpointing.blocks(base)
    assert len(found) == 2
    with gradient_checkpointing.on(base, []):
        assert all("forward" in vars(b) for b in found)
    assert not any("forward" in vars(b) for b in found)

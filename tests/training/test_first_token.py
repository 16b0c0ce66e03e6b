"""A classifier that reads the first token alone trains and answers the same without the other tokens' part."""

import collections
import functools

import pytest
import torch
import transformers
from support.models import SHAPE, saved
from support.parity import EXACT, close, run, spec_of, trainer, workload_of

from lorasweep.training import engine, first_token

pytestmark = pytest.mark.usefixtures("always_together")

FAMILIES = {
    "bert": (transformers.BertConfig, SHAPE, "encoder.layer.3.attention.output"),
    "roberta": (transformers.RobertaConfig, SHAPE, "encoder.layer.3.attention.output"),
    "electra": (transformers.ElectraConfig, {**SHAPE, "embedding_size": 16}, "encoder.layer.3.attention.output"),
    "deberta": (transformers.DebertaV2Config, SHAPE, "encoder.layer.3.attention.output"),
    "distilbert": (
        transformers.DistilBertConfig,
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
        "transformer.layer.3.sa_layer_norm",
    ),
    "albert": (transformers.AlbertConfig, {**SHAPE, "embedding_size": 16}, None),
    "llama": (transformers.LlamaConfig, {**SHAPE, "num_key_value_heads": 2}, None),
    "bart": (
        transformers.BartConfig,
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        None,
    ),
}
"""Family -> config, its values, and the module from which on the first token is alone. ALBERT's only layer runs four
times, Llama's head reads the last token, BART's too, of its decoder."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    return {
        name: saved(config(**values), transformers.AutoModel, root / name)
        for name, (config, values, _) in FAMILIES.items()
    }


def made(folder, *more) -> engine.Engine:
    return trainer(spec_of("seq_cls", folder, *more), workload_of("seq_cls", folder, *more))


@pytest.mark.parametrize("family", FAMILIES)
def test_place_of_each_family(folders, family):
    found, expected = made(folders[family]), FAMILIES[family][2]
    if expected is None:
        assert found.traits.first_token is None
        return
    names = {module: name.partition(".")[2] for name, module in found.base.model.named_modules()}
    assert names[found.traits.first_token.module] == expected
    behind = {names[m] for m in found.traits.first_token.behind}
    assert not any(name.startswith(("encoder.layer.2.", "transformer.layer.2.", "embeddings")) for name in behind)
    assert any(name.endswith(("output.dense", "ffn.lin2")) for name in behind)


@pytest.mark.parametrize("family", [name for name, (*_, place) in FAMILIES.items() if place])
def test_answers_and_gradients_of_all_weights_are_those_of_all_tokens(folders, double, family):
    found = made(folders[family])
    net = found.base.model.double().requires_grad_(True)
    batch = found.task.collate([found.prepared.train[:5]], found.prepared.pad_id)
    assert len(set(batch.inputs["attention_mask"].sum(1).tolist())) > 1, "nothing is padded"

    def answered() -> list[torch.Tensor]:
        net.zero_grad()
        losses = found.task.row_losses(net, batch)
        losses.sum().backward()
        return [losses, *(p.grad for p in net.parameters() if p.grad is not None)]

    whole = answered()
    with found.traits.first_token.used():
        first = answered()
    assert len(first) == len(whole) > 20
    for a, b in zip(first, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


TRIALS = [
    ("lora.target_modules=all-linear", "lora.r=3", "lora.bias=all"),
    ("lora.target_modules=mlp", "lora.use_dora=true", "train.seed=4"),
    ("lora.target_modules=[query]", "lora.modules_to_save=[classifier,layer.3.output.dense]", "train.batch_size=3"),
    ("lora.target_modules=[query]", "lora.modules_to_save=[layer.3.attention.output]"),
    ("lora.target_modules=all-linear", "lora.init_lora_weights=pissa", "train.gradient_checkpointing=true"),
]
WHOLE = ("lora.target_modules=[query]", "lora.modules_to_save=[layer.3]")
"""Computes its own layer in the place of the last one."""


@pytest.mark.parametrize("width", [1, len(TRIALS)])
@pytest.mark.parametrize("trials", [TRIALS, [*TRIALS[:2], WHOLE]])
def test_trials_end_the_same(folders, double, width, trials):
    jobs = [
        engine.Job(i, spec_of("seq_cls", folders["bert"], "train.max_steps=6", "train.eval_every=3", *one))
        for i, one in enumerate(trials)
    ]
    ends = []
    for with_place in (True, False):
        one = made(folders["bert"])
        assert one.traits.first_token is not None
        if not with_place:
            one.traits.first_token = None
        ends.append(run(one, jobs, width))
    for i in range(len(trials)):
        assert ends[0][i].losses and ends[0][i].metrics and ends[0][i].gradients
        close(ends[0][i], ends[1][i], EXACT)


def test_what_is_behind_is_computed_for_one_token(folders):
    found, seen = made(folders["bert"]), []
    spec = spec_of("seq_cls", folders["bert"], "train.max_steps=1", "train.batch_size=4", "lora.target_modules=mlp")
    found.base.model.bert.encoder.layer[3].output.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    run(found, [engine.Job(0, spec), engine.Job(1, spec)], 2)
    assert seen and {shape[1] for shape in seen} == {1}


@pytest.mark.parametrize("more", ["model.pooling=mean", "model.base_dropout=true"])
def test_all_tokens_where_the_head_reads_all_or_the_base_drops_some(folders, more):
    found, seen = made(folders["bert"], more), []
    spec = spec_of("seq_cls", folders["bert"], "train.max_steps=1", "lora.target_modules=mlp", more)
    found.base.model.bert.encoder.layer[3].output.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    run(found, [engine.Job(0, spec)], 1)
    assert seen and min(shape[1] for shape in seen) > 1


def test_flops_count_no_token_that_is_left_out(folders):
    found = made(folders["bert"])
    spec = spec_of("seq_cls", folders["bert"], "train.max_steps=1", "lora.target_modules=[query]")
    counts = []
    for place in (found.traits.first_token, None):
        found.traits.first_token = place
        events = found.run(functools.partial(next, iter([engine.Job(0, spec)]), None))
        counts += [e.flops_a_token for e in events if isinstance(e, engine.TrialBegan)]
    layer, wide, behind = 32 * 32, 32 * 64, 4  # forward, and the gradient towards the input
    left_out = behind * (layer + 2 * wide + layer)  # attention's output, both of the MLP, the pooler
    heads = (4 + 6) * found.base.model.classifier.weight.numel()  # the base's and the trial's
    assert counts[1] - counts[0] == left_out + heads


def test_outputs_whose_parts_have_names_keep_them():
    """Reformer's layers give named tuples."""
    pair = collections.namedtuple("pair", ["states", "buckets"])
    found = first_token._first(pair(torch.zeros(1, 5, 3), None))
    assert found.states.shape == (1, 1, 3) and found.buckets is None

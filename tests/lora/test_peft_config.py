"""peft's config for a model, and what the model lacks for it."""

from dataclasses import replace

import peft
import pytest
from peft import get_peft_model
from support.adapters import prepared

from lorasweep.lora import adapter, peft_config
from lorasweep.models.target_modules import described_layers, layers_of, preset_names


def test_all_linear_is_pefts(tiny_bert):
    spec, _, load = prepared(tiny_bert)
    ours = peft_config.config(spec.lora, spec.task_type, base := load()).target_modules
    theirs = get_peft_model(base.model, peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    assert set(ours) == set(theirs.peft_config["default"].target_modules)


def test_layers_narrow_a_preset(tiny_llama):
    spec, _, load = prepared(
        tiny_llama, "task_type=causal_lm", "lora.target_modules=qv", "lora.layers_to_transform=[1]"
    )
    names = peft_config.config(spec.lora, spec.task_type, load()).target_modules
    assert set(names) == {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("[query,q_porj]", "'q_porj' matches no module"),
        ("[LayerNorm]", "modules that LoRA does not adapt (LayerNorm"),
        ("[query,LayerNorm]", "write lora.target_modules=[query]"),
        ("'.*nothing'", "matches no whole module name"),
        ("'('", "no regular expression"),
        ("'(' lora.init_lora_weights=pissa lora.rank_pattern={query:2}", "no regular expression"),
    ],
)
def test_target_that_matches_nothing_is_refused(tiny_bert, target, words):
    spec, _, load = prepared(tiny_bert, *f"lora.target_modules={target}".split())
    assert any(words in p for p in peft_config.problems(spec.lora, spec.task_type, load()))


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_initialisation_that_would_change_a_tied_weight_is_refused(tied_llama, init):
    spec, _, load = prepared(
        tied_llama, "lora.target_modules=[lm_head]", f"lora.init_lora_weights={init}", "task_type=causal_lm"
    )
    (problem,) = peft_config.problems(spec.lora, spec.task_type, load())
    assert "changes the weight of 'lm_head', which is that of 'model.embed_tokens' too" in problem


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["qurey", "classifier", "self", "(", "layer.7.*"])
def test_pattern_that_fits_no_adapted_module_is_refused(tiny_bert, key, pattern):
    spec, _, load = prepared(tiny_bert)
    lora = replace(spec.lora, **{key: {pattern: 2}})
    (problem,) = peft_config.problems(lora, spec.task_type, load())
    assert problem.startswith(f"lora.{key}: '{pattern}' ")


@pytest.mark.parametrize("pattern", ["query", "layer.0.*", r".*\.1\..*(query|key)", "bert.pooler.dense"])
def test_pattern_that_fits_some_modules_is_taken(tiny_bert, pattern):
    spec, _, load = prepared(tiny_bert)
    lora = replace(spec.lora, rank_pattern={pattern: 2}, alpha_pattern={pattern: 3})
    assert peft_config.problems(lora, spec.task_type, load()) == []


def test_unknown_module_to_save_is_refused(tiny_bert):
    spec, _, load = prepared(tiny_bert, "lora.modules_to_save=[poler]")
    assert any("'poler' is no module" in p for p in peft_config.problems(spec.lora, spec.task_type, load()))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("lora.target_parameters=[query.wieght]", "'query.wieght' is no parameter of BertForSequenceClassification"),
        ("lora.target_parameters=[query.wieght]", "did you mean 'query.weight'?"),
        ("lora.target_parameters=[classifier.weight]", "lies in 'classifier', which trains in full"),
        ("lora.target_parameters=[query.bias]", "has 1 dimensions, and peft adapts parameters of 2 or 3"),
        ("lora.target_parameters=[value.weight]", "is adapted by lora.target_modules=['value'] already"),
    ],
)
def test_parameters_that_peft_cannot_adapt_are_refused(tiny_bert, more, words):
    spec, _, load = prepared(tiny_bert, "lora.target_modules=[value]", more)
    assert any(words in p for p in peft_config.problems(spec.lora, spec.task_type, load()))
    spec, _, load = prepared(tiny_bert, "lora.target_modules=[value]", "lora.target_parameters=[query.weight]")
    assert peft_config.problems(spec.lora, spec.task_type, load()) == []


TREES = {
    "t5": ("tiny_t5", "task_type=seq_2_seq_lm"),
    "llama": ("tiny_llama", "task_type=causal_lm"),
    "bert": ("tiny_bert", "task_type=seq_cls"),
    "t5 by sublayer": ("tiny_t5", "task_type=seq_2_seq_lm", "lora.layers_pattern=layer"),
    "t5 by block": ("tiny_t5", "task_type=seq_2_seq_lm", "lora.layers_pattern=block"),
    "either": ("tiny_llama", "task_type=causal_lm", "lora.layers_pattern=[h,layers]"),
}


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("index", [0, 1])
def test_a_preset_counts_layers_as_peft_does(request, tree, index):
    folder, *overrides = TREES[tree]
    asked = [*overrides, f"lora.layers_to_transform=[{index}]", "lora.target_modules=attention"]
    spec, _, load = prepared(request.getfixturevalue(folder), *asked)
    base = load()
    of_attention = set(preset_names(base, (), "attention"))
    names = peft_config.config(spec.lora, spec.task_type, base).target_modules
    suffixes = sorted({n.rpartition(".")[2] for n in names})
    by_name = replace(spec.lora, target_modules=suffixes)
    theirs = get_peft_model(
        base.model, peft_config.config(by_name, spec.task_type, base)
    ).base_model.targeted_module_names
    assert set(names) == set(theirs) & of_attention
    assert names
    assert {i for found in layers_of(names, spec.lora.layers_pattern).values() for i in found} == {index}


def test_a_block_of_t5_is_one_of_the_encoder_and_one_of_the_decoder(tiny_t5):
    asked = ["task_type=seq_2_seq_lm", "lora.target_modules=qv", "lora.layers_to_transform=1"]
    spec, _, load = prepared(tiny_t5, *asked)
    names = peft_config.config(spec.lora, spec.task_type, load()).target_modules
    layers = layers_of(names, None)
    assert layers == {"decoder.block": [1], "encoder.block": [1]}
    assert described_layers({"encoder.block": [0, 1, 2], "decoder.block": [1]}) == (
        "0 to 2 of encoder.block, 1 of decoder.block"
    )


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            "lora.layers_to_transform=[0,7]",
            "lora.layers_to_transform: no adapted module lies in layer 7; there is 0 to 1 ",
        ),
        (
            "lora.layers_to_transform=-1",
            "lora.layers_to_transform: no adapted module lies in layer -1; there is 0 to 1 ",
        ),
        (
            "lora.layers_pattern=blok",
            "lora.layers_pattern: 'blok' numbers none of the adapted modules; module lists are ",
        ),
        ("lora.layers_pattern='('", "lora.layers_pattern: '(' is no regular expression"),
    ],
)
@pytest.mark.parametrize("targets", ["attention", "[q,v]"])
def test_layers_that_are_not_there_are_refused(tiny_t5, targets, more, problem):
    asked = ["task_type=seq_2_seq_lm", f"lora.target_modules={targets}", "lora.layers_to_transform=0", more]
    spec, _, load = prepared(tiny_t5, *asked)
    problems = peft_config.problems(spec.lora, spec.task_type, load())
    assert [p[: len(problem)] for p in problems] == [problem]


def test_alpha_ratio_keeps_each_modules_own_scale(tiny_bert, tmp_path):
    asked = ["lora.r=4", "lora.alpha_ratio=2", "lora.rank_pattern={value: 6, 0.attention.self.query: 2}"]
    asked += ["lora.target_modules=[query,key,value]", "lora.alpha_pattern={1.attention.self.key: 12}"]
    spec, _, load = prepared(tiny_bert, *asked)
    attached = adapter.attach(load(), spec.lora, spec.task_type, 0)
    layers = {n: m for n, m in attached.peft_model.named_modules() if hasattr(m, "lora_A")}
    scales = {n: layer.scaling["default"] for n, layer in layers.items()}
    assert {r for layer in layers.values() for r in layer.r.values()} == {2, 4, 6}
    own = {n: scale for n, scale in scales.items() if n.endswith("1.attention.self.key")}
    assert list(own.values()) == [3.0]
    assert {scale for n, scale in scales.items() if n not in own} == {2.0}
    adapter.save(attached, tmp_path)
    scale = adapter.saved_scale(tmp_path)
    assert {n: scale(n) for n in scales} == scales

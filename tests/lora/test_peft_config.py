"""peft's config for a model, and what the model lacks for it."""

import peft
import pytest
from peft import get_peft_model
from support.adapters import prepared

from lorasweep.lora import peft_config


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
        ("'.*nothing'", "matches no whole module name"),
        ("'('", "no regular expression"),
    ],
)
def test_target_that_matches_nothing_is_refused(tiny_bert, target, words):
    spec, _, load = prepared(tiny_bert, f"lora.target_modules={target}")
    assert any(words in p for p in peft_config.problems(spec.lora, spec.task_type, load()))


def test_initialisation_that_would_change_a_tied_weight_is_refused(tied_llama):
    spec, _, load = prepared(
        tied_llama, "lora.target_modules=[lm_head]", "lora.init_lora_weights=pissa", "task_type=causal_lm"
    )
    (problem,) = peft_config.problems(spec.lora, spec.task_type, load())
    assert "changes the weight of 'lm_head', which is that of 'model.embed_tokens' too" in problem


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

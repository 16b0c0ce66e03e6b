"""train.learning_rate=auto: near published recipes, by what is known before training."""

import math

import pytest
from support import families

from lorasweep import tasks
from lorasweep.config import compose
from lorasweep.errors import ConfigError
from lorasweep.training import learning_rate

PUBLISHED = [  # family and its sizes, settings, what recipes for it have
    ("bert", 768, ["task_type=seq_cls"], 4e-4),  # LoRA's authors, RoBERTa base
    ("bert", 1024, ["task_type=seq_cls"], 3e-4),  # PEFT's guide, RoBERTa large
    ("llama", 2048, ["task_type=causal_lm"], 3e-4),  # torchtune, Llama 3.2 1B
    ("llama", 2048, ["task_type=causal_lm", "train.batch_size=128"], 1e-3),  # Tinker's sweep
    ("llama", 4096, ["task_type=causal_lm"], 2e-4),  # Axolotl, Unsloth, QLoRA at 8B
    ("llama", 4096, ["task_type=causal_lm", "train.batch_size=128"], 3e-4),  # Tinker's sweep
    ("llama", 8192, ["task_type=causal_lm"], 1e-4),  # QLoRA beyond 13B
    ("bert", 384, ["task_type=feature_extraction"], 2e-4),  # Unsloth, MiniLM
    ("t5", 512, ["task_type=seq_2_seq_lm"], 1e-3),  # PEFT's guide, mT0
]


def rate(family: str, hidden: int, *overrides: str) -> float:
    spec = compose.compose_trial(["train.learning_rate=auto", "lora.lora_alpha=32", *overrides])
    size = {"d_model": hidden} if family == "t5" else {"hidden_size": hidden, "num_attention_heads": 8}
    return learning_rate.peak(spec, tasks.make(spec.task_type), families.on_meta(family, **size).model)


@pytest.mark.parametrize(("family", "hidden", "overrides", "published"), PUBLISHED)
def test_rule_lies_within_a_factor_of_three_of_published_rates(family, hidden, overrides, published):
    assert published / 3 <= rate(family, hidden, *overrides) <= published * 3


def test_rule_goes_by_scale_start_and_multiple():
    def against(*overrides: str) -> float:
        return rate("bert", 768, *overrides) / rate("bert", 768, "lora.r=16")

    assert against("lora.lora_alpha=16") == pytest.approx(2)
    assert against("lora.lora_alpha=null", "lora.alpha_ratio=2", "lora.r=64") == pytest.approx(1)
    assert against("lora.r=64") == pytest.approx(1)
    assert against("lora.use_rslora=true", "lora.r=16") == pytest.approx(1 / 4)
    assert against("lora.init_lora_weights=gaussian") == against("lora.init_lora_weights=pissa") == pytest.approx(1 / 4)
    assert against("train.lr_multiple=3") == pytest.approx(3)
    assert against("train.batch_size=64") == pytest.approx(2)
    assert against("train.batch_size=4096") == pytest.approx(math.sqrt(8))


def test_batch_of_anchors_and_positives_changes_no_rate():
    asked = ["task_type=feature_extraction"]
    assert rate("bert", 768, *asked) == rate("bert", 768, *asked, "train.batch_size=256")


def test_given_rate_stays_and_takes_no_multiple():
    spec = compose.compose_trial(["train.learning_rate=7e-4"])
    task = tasks.make(spec.task_type)
    model = families.on_meta("bert").model
    assert learning_rate.peak(spec, task, model) == 7e-4 and learning_rate.said(spec, task, model) == ""
    assert compose.compose_trial([]).train.learning_rate == 1e-3
    with pytest.raises(ConfigError, match="lr_multiple: multiplies"):
        compose.compose_trial(["train.lr_multiple=2"])
    with pytest.raises(ConfigError, match="learning_rate: must be auto or a number"):
        compose.compose_trial(["train.learning_rate=fast"])

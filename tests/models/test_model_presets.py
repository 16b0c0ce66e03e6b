"""conf/model: each name composes, its published shape builds without weights, and its presets find every layer."""

import pytest
import transformers
from support import families

from lorasweep.config import compose
from lorasweep.config.overrides import group_options
from lorasweep.config.spec import LoraSpec, TaskSpec
from lorasweep.lora import peft_config
from lorasweep.models import target_modules

CLASSIFIER = "AutoModelForSequenceClassification"


def shape(hidden: int, layers: int, heads: int, inner: int, **more: object) -> dict[str, object]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": inner, **more}


def grouped(kv: int, head_dim: int) -> dict[str, object]:
    return {"num_key_value_heads": kv, "head_dim": head_dim}


# The sizes of the published config.json, and how many linear layers a layer's attention and MLP have.
PUBLISHED = {
    "bert_base": ("bert", shape(768, 12, 12, 3072), CLASSIFIER, 4, 2),
    "bert_base_chinese": ("bert", shape(768, 12, 12, 3072), CLASSIFIER, 4, 2),
    "roberta_base": ("roberta", shape(768, 12, 12, 3072), CLASSIFIER, 4, 2),
    "modernbert_base": ("modernbert", shape(768, 22, 12, 1152), CLASSIFIER, 2, 2),
    "deberta_v3_base": ("deberta-v2", shape(768, 12, 12, 3072), CLASSIFIER, 4, 2),
    "bge_m3": ("xlm-roberta", shape(1024, 24, 16, 4096), CLASSIFIER, 4, 2),
    "llama3_2_1b": ("llama", shape(2048, 16, 32, 8192, **grouped(8, 64)), "", 4, 3),
    "llama3_1_8b": ("llama", shape(4096, 32, 32, 14336, **grouped(8, 128)), "", 4, 3),
    "qwen3_0_6b": ("qwen3", shape(1024, 28, 16, 3072, **grouped(8, 128)), "", 4, 3),
    "qwen3_4b_instruct": ("qwen3", shape(2560, 36, 32, 9728, **grouped(8, 128)), "", 4, 3),
    "qwen3_8b": ("qwen3", shape(4096, 36, 32, 12288, **grouped(8, 128)), "", 4, 3),
    "qwen3_embedding_0_6b": ("qwen3", shape(1024, 28, 16, 3072, **grouped(8, 128)), "", 4, 3),
    "gemma3_1b": ("gemma3_text", shape(1152, 26, 4, 6912, **grouped(1, 256)), "", 4, 3),
    "embeddinggemma_300m": ("gemma3_text", shape(768, 24, 3, 1152, **grouped(1, 256)), "", 4, 3),
    "smollm3_3b": ("smollm3", shape(2048, 36, 16, 11008, num_key_value_heads=4), "", 4, 3),
    "gpt_oss_20b": ("gpt_oss", shape(2880, 24, 64, 2880, num_local_experts=32, **grouped(8, 64)), "", 4, 0),
}
SHAPE_NOT_KNOWN = {"qwen3_5_4b", "flan_t5_base"}
"""Hub models whose family is in test_target_modules, and whose published sizes do not stand here."""
ON_THIS_MACHINE = {"minilm", "minilm_encoder_decoder", "smollm2_135m"}


def test_every_name_is_tried():
    assert set(group_options("model")) == {*PUBLISHED, *SHAPE_NOT_KNOWN, *ON_THIS_MACHINE}


@pytest.mark.parametrize("name", sorted(group_options("model")))
def test_name_composes(name):
    pretrained = compose.compose_trial([f"model={name}"]).model.pretrained
    assert pretrained.count("/") == 1 or pretrained.startswith(("package:", "fetched:"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shape_builds_and_its_presets_find_every_layer(name):
    family, sizes, auto, attention, mlp = PUBLISHED[name]
    base = families.on_meta(family, auto, **sizes)
    assert isinstance(base.model, transformers.PreTrainedModel)
    layers = sizes["num_hidden_layers"]
    assert len(target_modules.preset_names(base, (), "attention")) == attention * layers
    assert len(target_modules.preset_names(base, (), "mlp")) == mlp * layers
    task = TaskSpec(name="SEQ_CLS" if auto else "CAUSAL_LM")
    assert peft_config.notes(LoraSpec(target_modules="all"), task, base) == []
    assert peft_config.problems(LoraSpec(target_modules="all"), task, base) == []

"""attention, mlp, qv, qkvo, experts and all mean what they say in each family that people fine-tune."""

import re

import peft
import pytest
import torch
import transformers
from support import families

from lorasweep.config.spec import LoraSpec, TaskSpec
from lorasweep.lora import peft_config
from lorasweep.models import target_modules
from lorasweep.models.module_kinds import kind_of

QKVO = "q_proj k_proj v_proj o_proj"
GATED = "gate_proj up_proj down_proj"
BERT = "query key value dense"
EXPERTS = "mlp.experts.down_proj mlp.experts.gate_up_proj"
HYBRID = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
GRANITE = {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2, "num_local_experts": 0}

# attention, mlp, qv, what of attention is not in qkvo, experts; "" where there is none. Last parts of names.
ROWS = {
    "llama qwen2 qwen3 mistral gemma gemma2 gemma3_text gemma3 gemma4_text smollm3 olmo olmo2 olmo3 granite cohere"
    " cohere2 stablelm exaone4 ernie4_5 seed_oss eurobert nomic_bert gte t5gemma": (
        QKVO,
        GATED,
        "q_proj v_proj",
        "",
        "",
    ),
    "qwen3_moe mixtral phimoe gpt_oss olmoe": (QKVO, "", "q_proj v_proj", "", EXPERTS),
    "qwen2_moe glm4_moe": (QKVO, GATED, "q_proj v_proj", "", EXPERTS),
    "llama4_text": (QKVO, GATED, "q_proj v_proj", "", EXPERTS.replace("mlp", "feed_forward")),
    "granitemoe": (QKVO, "", "q_proj v_proj", "", EXPERTS.replace("mlp", "block_sparse_moe")),
    "qwen3_5_text": (
        f"{QKVO} in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj",
        *(GATED, "q_proj v_proj in_proj_qkv", "in_proj_z in_proj_a in_proj_b", ""),
    ),
    "qwen3_next": (
        f"{QKVO} in_proj_qkvz in_proj_ba out_proj",
        *(GATED, "q_proj v_proj in_proj_qkvz", "in_proj_ba", EXPERTS),
    ),
    "phi": ("q_proj k_proj v_proj dense", "fc1 fc2", "q_proj v_proj", "", ""),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj", "qkv_proj", "", ""),
    "glm glm4": (QKVO, "gate_up_proj down_proj", "q_proj v_proj", "", ""),
    "deepseek_v2 deepseek_v3": (
        "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        *(GATED, "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj", "", EXPERTS),
    ),
    "falcon gpt_neox bloom": ("query_key_value dense", "dense_h_to_4h dense_4h_to_h", "query_key_value", "", ""),
    "mpt": ("Wqkv out_proj", "up_proj down_proj", "Wqkv", "", ""),
    "gpt2 gpt_bigcode": ("c_attn c_proj", "c_fc c_proj", "c_attn", "", ""),
    "gptj": ("q_proj k_proj v_proj out_proj", "fc_in fc_out", "q_proj v_proj", "", ""),
    "gpt_neo": ("q_proj k_proj v_proj out_proj", "c_fc c_proj", "q_proj v_proj", "", ""),
    "starcoder2": (QKVO, "c_fc c_proj", "q_proj v_proj", "", ""),
    "opt bart mbart pegasus marian blenderbot m2m_100": (
        "q_proj k_proj v_proj out_proj",
        *("fc1 fc2", "q_proj v_proj", "", ""),
    ),
    "mamba mamba2": ("in_proj", "", "", "in_proj", ""),
    "falcon_h1": (f"{QKVO} in_proj", GATED, "q_proj v_proj", "in_proj", ""),
    "granitemoehybrid": (f"{QKVO} in_proj", "input_linear output_linear", "q_proj v_proj", "in_proj", ""),
    "lfm2": ("q_proj k_proj v_proj out_proj in_proj", "w1 w2 w3", "q_proj v_proj", "in_proj", ""),
    "nemotron_h": (
        f"{QKVO} in_proj",
        *("up_proj down_proj", "q_proj v_proj", "in_proj", "mixer.experts.down_proj mixer.experts.up_proj"),
    ),
    "recurrent_gemma": (
        f"{QKVO} linear_x linear_y linear_out",
        *(GATED, "q_proj v_proj", "linear_x linear_y linear_out", ""),
    ),
    "t5 longt5": ("q k v o", "wi wo", "q v", "", ""),
    "mt5 umt5": ("q k v o", "wi_0 wi_1 wo", "q v", "", ""),
    "bert roberta xlm-roberta camembert electra big_bird rembert roformer": (BERT, "dense", "query value", "", ""),
    "distilbert xlm flaubert": ("q_lin k_lin v_lin out_lin", "lin1 lin2", "q_lin v_lin", "", ""),
    "albert": (BERT, "ffn ffn_output", "query value", "", ""),
    "deberta": ("in_proj dense", "dense", "in_proj", "", ""),
    "deberta-v2": ("query_proj key_proj value_proj dense", "dense", "query_proj value_proj", "", ""),
    "mpnet": ("q k v o", "dense", "q v", "", ""),
    "longformer": (
        "query key value query_global key_global value_global dense",
        *("dense", "query value query_global value_global", "", ""),
    ),
    "modernbert": ("Wqkv Wo", "Wi Wo", "Wqkv", "", ""),
    "xlnet": ("", "layer_1 layer_2", "", "", ""),
    "funnel": ("q_head k_head v_head post_proj", "linear_1 linear_2", "q_head v_head", "", ""),
}
TABLE = {family: row for names, row in ROWS.items() for family in names.split()}
MORE = {"lfm2": HYBRID, "granitemoehybrid": GRANITE}


def last_parts(names: list[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def meant(base: target_modules.Base, preset: str) -> list[str]:
    return target_modules.preset_names(base, (), preset)


@pytest.mark.parametrize("family", TABLE)
def test_presets_mean_what_they_say(family):
    base = families.on_meta(family, **MORE.get(family, {}))
    attention, mlp, qv, not_qkvo, experts = (set(text.split()) for text in TABLE[family])
    assert last_parts(meant(base, "attention")) == attention
    assert last_parts(meant(base, "mlp")) == mlp
    assert last_parts(meant(base, "qv")) == qv
    assert last_parts(meant(base, "qkvo")) == attention - not_qkvo
    assert set(target_modules.expert_parameters(base)) == experts
    assert set(meant(base, "all")) == set(meant(base, "attention")) | set(meant(base, "mlp"))
    assert not set(meant(base, "attention")) & set(meant(base, "mlp"))
    assert set(meant(base, "all")) <= set(meant(base, "all-linear"))


BESIDE = (
    r"mlp\.(router|shared_expert_gate)|feed_forward\.router|router\w*\.\w+|gate\.down_proj"  # routers
    r"|(indexer|compressor|scorer)\.\w+|sconv\.weight_proj"  # what chooses tokens, or shifts them
    r"|(mamba|mixer)\.(x_proj|dt_proj|out_proj)"  # read past their modules by a state space's kernels
    r"|layers\.(linear|per_layer_\w+)|ada_rms_norm\.\w+"  # between layers
    r"|en_XX\.\w+|(bottleneck|input|intermediate_query|output_query)\.dense|answer_head\.logit_fc"
)
"""Linear layers of a layer that no preset but all-linear means, by the last two parts of their names."""


@pytest.mark.slow
def test_no_family_has_a_layer_of_a_kind_nobody_knows():
    """All that transformers builds here: what lies in a layer and reads text is attention, a mixer, an MLP or known."""
    unknown, built = {}, 0
    for family in sorted({f for names in families.HEADS.values() for f in names}):
        try:
            base = families.on_meta(family)
        except Exception:
            continue  # its default config builds nothing
        built += 1
        names = [n for n in meant(base, "all-linear") if any(part.isdigit() for part in n.split("."))]
        others = [n for n in names if kind_of(n).block == "other" and not target_modules.reads_no_text(n)]
        short = {n: ".".join([part for part in n.split(".") if not part.isdigit()][-2:]) for n in others}
        unknown |= {f"{family} {n}": n for n in others if not re.fullmatch(BESIDE, short[n])}
    assert built > 200
    assert unknown == {}


def test_towers_that_read_no_text_are_left_out_and_all_linear_says_so():
    base = families.on_meta("gemma3")
    assert all("language_model" in name for name in meant(base, "all"))
    (note,) = notes(base, "all-linear")
    assert "read no text" in note and "vision" in note


def notes(base: target_modules.Base, preset: str) -> list[str]:
    return peft_config.notes(LoraSpec(target_modules=preset), TaskSpec(name="CAUSAL_LM"), base)


@pytest.mark.parametrize(
    ("family", "preset", "words"),
    [
        ("granitemoehybrid", "qv", "1 of 2 layers have no queries and values"),
        ("granitemoehybrid", "attention", "in 1 of 2 layers mamba.in_proj take attention's place"),
        ("lfm2", "all", "in 1 of 2 layers conv.in_proj, conv.out_proj take attention's place"),
        ("gpt2", "qv", "c_attn holds the keys, too"),
        ("xlnet", "all", "4 of 4 layers have no attention that LoRA adapts as linear layers"),
        ("gpt_oss", "all-linear", "experts (mlp.experts.down_proj, mlp.experts.gate_up_proj) are no linear layers"),
        ("deepseek_v3", "mlp", "linear layers of these names stay as they are"),
    ],
)
def test_a_preset_that_finds_a_part_says_so(family, preset, words):
    assert any(words in note for note in notes(families.on_meta(family, **MORE.get(family, {})), preset))


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "t5", "bert", "xlm", "gpt_oss"])
def test_a_preset_that_finds_all_says_nothing(family):
    base = families.on_meta(family)
    assert [*notes(base, "attention"), *notes(base, "mlp"), *notes(base, "all")] == []


@pytest.mark.parametrize(
    ("family", "preset", "words"),
    [
        ("xlnet", "attention", "preset 'attention' matches no module of XLNet"),
        ("mamba", "mlp", "preset 'mlp' matches no module of Mamba"),
        ("llama", "experts", "preset 'experts' matches no module of Llama"),
    ],
)
def test_a_preset_that_finds_nothing_is_refused_with_what_is_there(family, preset, words):
    base = families.on_meta(family)
    (problem,) = peft_config.problems(LoraSpec(target_modules=preset), TaskSpec(name="CAUSAL_LM"), base)
    assert words in problem
    assert {"xlnet": "layer_1", "mamba": "in_proj", "llama": "gate_proj"}[family] in problem


PEFT = "llama gpt_oss qwen3_moe qwen2_moe mixtral llama4_text deepseek_v3 mamba2 falcon_h1 nemotron_h qwen3_5_text lfm2"


@pytest.mark.parametrize("preset", ["attention", "mlp", "experts", "all", "all-linear"])
@pytest.mark.parametrize("family", PEFT.split())
def test_peft_adapts_what_a_preset_means(family, preset):
    """Each module and each expert parameter that is meant gets its adapter, and nothing else does."""
    base = families.on_meta(family, **MORE.get(family, {}))
    lora, task = LoraSpec(target_modules=preset, r=2), TaskSpec(name="CAUSAL_LM")
    wanted = peft_config.config(lora, task, base)
    if not wanted.target_modules and not wanted.target_parameters:
        pytest.skip("the family has none")
    names = set(meant(base, preset))
    parameters = target_modules.expert_parameters(base) if peft_config.takes_experts(lora, base) else []
    if peft_config.converts_experts(base) and parameters:
        names = {n for n in names if n.rpartition(".")[2] not in target_modules.EXPERTS}
    with torch.device("meta"):
        adapted = peft.get_peft_model(base.model, wanted).base_model
    assert set(adapted.targeted_module_names) == names
    found = {".".join(n.split(".")[-3:]) for n in adapted.targeted_parameter_names}
    routers = {"mlp.gate.weight"} if preset == "all-linear" else set()  # peft's all-linear has them with the experts
    assert found - routers == set(parameters)


def test_presets_find_a_sentence_transformers_encoder_without_a_head():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    with torch.device("meta"):
        base = target_modules.Base(transformers.BertModel(config), None, ())
    assert len(meant(base, "attention")) == 8 and len(meant(base, "mlp")) == 4


def test_part_of_a_head_that_peft_takes_for_one_is_no_target():
    """Without weights nobody knows that DistilBERT's pre_classifier is new; peft saves it as a classifier."""
    config = transformers.DistilBertConfig(dim=32, n_layers=1, n_heads=4, hidden_dim=64)
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    base = target_modules.Base(model, None, ())
    found = target_modules.preset_names(base, ("classifier", "score"), "all-linear")
    assert last_parts(found) == {"q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"}
    task = TaskSpec(name="SEQ_CLS")
    assert peft.get_peft_model(model, peft_config.config(LoraSpec(), task, base))

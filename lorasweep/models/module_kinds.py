"""What a linear layer is by its name: part of attention (queries, keys, values, output) or of a feed-forward network.

transformers names modules by what they are, with a few dozen words over all families. A module's kind is that of the
innermost part of its path that says one, so that `attention.output.dense` is attention and `output.dense` is not.
"""

import re
from dataclasses import dataclass, field

ATTENTION = re.compile(
    r"(?i)(\w+_)?(self|cross|encoder|linear|rel|multi_head|local|global|c|full)?_?(attn|attention|attentions|att)"
    r"|(\w+_)?(self|cross|encdec|localself|transientglobalself)(attn|attention)|enc_dec_attention"
)
"""Parts of a path that hold attention: self_attn, crossattention, EncDecAttention, linear_attn, attentions."""

MIXER = re.compile(r"mamba|mixer|conv|temporal_block|mlstm_layer|mlstm|rg_lru|short_conv|ssm|recurrent_block")
"""What stands in attention's place in some layers of a hybrid: state spaces, gated convolutions, recurrences."""

STATE_SPACE = re.compile(r"mamba|mixer|ssm")
"""Mixers whose kernels read all weights but the first past their modules: an adapter there would learn nothing."""

FEED_FORWARD = re.compile(
    r"(?i)(\w+_)?(mlps?|ffns?|ff|feed_?forward|moe|experts?)(_\w+)?|ff\d|DenseReluDense|(\w+_)?inter(mediate)?"
)
"""Parts of a path that hold a feed-forward network or experts."""

ASIDE = re.compile(
    r"(?i)router\w*|gate|indexer|compressor|adapter_modules|altup|laurel|(\w+_)?sconv|pooler|classifier\w*|score|lm_head"
    r"|\w*predictions"
)
"""Parts of a path whose linear layers are neither: routers, heads, small parts beside the network."""

ROUTER = re.compile(r"gate|router|shared_expert_gate|weights_proj|classifier")
"""Linear layers that choose among experts, or among tokens."""

OTHER_INPUTS = re.compile(
    r"(?i)(\w+_)?(vision|visual|visn|image|img|audio|speech|video|acoustic|semantic_tokenizer|diarization|patcher)(_\w+)?"
    r"|multi_modal_projector"
)
"""Parts of a path that read no text: they get no gradient from it."""

ROLES = {
    "q": r"(\w2\w_)?q|q_proj|(\w+_)?query(_proj|_global)?|q_lin|q_head|q_[ab]_proj|Wq|to_q|project_q|q_attn",
    "k": r"k|k_proj|key|(layout_)?key(_proj|_global)?|k_lin|k_head|Wk|project_k",
    "v": r"v|v_proj(_\w+)?|(layout_)?value(_proj|_global)?|v_lin|v_head|Wv|project_v",
    "kv": r"kv_a_proj_with_mqa|kv_b_proj|kv_proj|to_kv|kv_a_proj",
    "qkv": r"query_key_value|qkv|qkv_proj|Wqkv|c_attn|in_proj_qkvz?|qkvz_proj",
    "o": r"o|o_proj|out_proj|out_lin|o_lin|dense|c_proj|Wo|output|proj|to_out|post_proj|attention_out|o_[ab]_proj",
}
"""Queries, keys, values and output among attention's layers, by the last part of the name."""

IN_LAYER = {
    "attention": r"[qkvo]_proj|[qkv]_lin|out_lin|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj",
    "mlp": r"fc[12]|lin[12]|ffn|ffn_output|(gate|up|down)_proj",
}
"""Names that say a kind by themselves, of layers that lie in no part that does."""

ONLY_FEED_FORWARD = re.compile(r"(gate_|up_|down_)+proj")
ONLY_ATTENTION = re.compile(r"[qkvo]_proj")
"""Names that say which of both a mixer is, where a model calls each of its layers' networks so."""


@dataclass(frozen=True)
class Kind:
    """What a linear layer is."""

    block: str = "other"
    """attention, mixer (in attention's place), mlp or other."""
    roles: frozenset[str] = field(default_factory=frozenset)
    """Which of q, k, v and o an attention layer gives; several where they are one matrix."""
    expert: bool = False
    """Whether it is one of several experts' own."""


OTHER = Kind()


def kind_of(name: str) -> Kind:
    """Return what the linear layer of this full name is."""
    *holders, last = name.split(".")
    if last.isdigit() and holders:
        last = holders[-1]  # one of a short list of layers: ctrl's ffn.0
    if not any(part.isdigit() for part in holders):
        return OTHER  # outside the layers: projections of embeddings, poolers, heads
    if reads_no_text(name) or any(ASIDE.fullmatch(part) for part in holders):
        return OTHER
    if ROUTER.fullmatch(last):
        return OTHER
    block = _block(holders, last)
    if block == "mlp":
        return Kind("mlp", expert="experts" in holders)
    if block == "attention":
        return Kind("attention", _roles(holders, last))
    if block == "mixer" and ONLY_ATTENTION.fullmatch(last):
        return Kind("attention", _roles(holders, last))
    if block == "mixer" and (last == "in_proj" or not any(STATE_SPACE.fullmatch(part) for part in holders)):
        return Kind("mixer")
    return OTHER


def reads_no_text(name: str) -> bool:
    """Tell whether a module lies in a part of the model that reads images or sounds."""
    return any(OTHER_INPUTS.fullmatch(part) for part in name.split("."))


def _block(holders: list[str], last: str) -> str:
    """Return which kind of network the innermost telling part of a path holds."""
    for part in reversed(holders):
        if ATTENTION.fullmatch(part):
            return "attention"
        if MIXER.fullmatch(part):
            return "mlp" if ONLY_FEED_FORWARD.fullmatch(last) else "mixer"
        if FEED_FORWARD.fullmatch(part):
            return "mlp"
    if re.fullmatch(r"(\w+_)?output", holders[-1]):
        return "mlp"  # BERT's second layer; attention's own output lies in attention
    return next((block for block, names in IN_LAYER.items() if re.fullmatch(names, last)), "other")


def _roles(holders: list[str], last: str) -> frozenset[str]:
    if last == "in_proj" and holders[-1] == "self":
        return frozenset("qkv")  # DeBERTa's first version
    if last == "linear":  # a layer in a shell of the project's own: k_proj.linear
        last = holders[-1]
    return next((frozenset(roles) for roles, names in ROLES.items() if re.fullmatch(names, last)), frozenset())

"""Model families on the meta device, with few layers of each kind: names and shapes, no weights."""

import contextlib
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from lorasweep.models.base_model import Base

HEADS = {
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "AutoModelForSeq2SeqLM": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
COUNTS += ("encoder_layers", "decoder_layers", "num_decoder_layers", "num_encoder_layers")
KINDS = ("layer_types", "layers_block_type")
LAYERS = 4


def config(family: str, **more: Any) -> Any:
    """Return the family's default config, cut to four layers, one of each kind first."""
    found = transformers.CONFIG_MAPPING[family](**more)
    for name in COUNTS:
        if isinstance(getattr(found, name, None), int) and name not in more:
            with contextlib.suppress(Exception):  # some count their layers by their kinds
                setattr(found, name, min(LAYERS, getattr(found, name)))
    for name in KINDS:
        kinds = getattr(found, name, None)
        if isinstance(kinds, list) and not {name, *COUNTS} & more.keys():
            with contextlib.suppress(Exception):
                setattr(found, name, [*dict.fromkeys(kinds), *kinds][:LAYERS])
    return found


def on_meta(family: str, auto: str = "", **more: Any) -> Base:
    """Return a family's model without weights; of several tasks' the first that it has."""
    auto = auto or next(name for name, families in HEADS.items() if family in families)
    wanted = config(family, **more)
    with torch.device("meta"):
        model = getattr(transformers, auto).from_config(wanted)
    return Base(model, None, ())

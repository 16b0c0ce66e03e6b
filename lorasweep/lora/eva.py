"""EVA: adapters that start from what their modules see of the training examples (arXiv:2410.07170)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorasweep.lora import peft_notices
from lorasweep.lora.peft_names import initialize_lora_eva_weights


def finish(peft_model: Any, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Let peft set A to the first singular vectors of each module's inputs, with the ranks redistributed."""
    with peft_notices.left_out(), torch.no_grad():
        initialize_lora_eva_weights(
            peft_model,
            list(batches),
            forward_fn=lambda model, inputs: model.base_model.model(**inputs),
            prepare_model_inputs_fn=lambda inputs, _: inputs["attention_mask"].bool(),
            prepare_layer_inputs_fn=_real_tokens,
            show_progress_bar=False,
        )
    peft_model.eval()  # peft leaves the model in training mode, and its A in the base's number format
    for name, parameter in peft_model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def _real_tokens(layer_input: Any, mask_BT: Tensor, _: str) -> Tensor:
    """Return a module's inputs [N, D] without those of padding, where it sees one vector a token."""
    x = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
    by_token = x.dim() == 3 and x.shape[:2] == mask_BT.shape
    return x[mask_BT] if by_token else x.reshape(-1, x.shape[-1]).contiguous()

"""An adapter on a tiny base, moved away from its start without training."""

import torch

from lorasweep.config import compose
from lorasweep.lora import adapter
from lorasweep.models import base_model
from lorasweep.training import workload


def prepared(folder, *overrides: str):
    spec = compose.compose_trial(
        [
            f"model.pretrained={folder}",
            "data.max_train_samples=64",
            "data.max_eval_samples=8",
            *overrides,
        ]
    )
    work = workload.workload(spec)
    return spec, work, lambda: base_model.load(spec.model, spec.train, work.task, work.tokenizer)


def move(attached: adapter.Attached) -> None:
    """Change every trained parameter, as training would."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in attached.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def logits(net, work) -> torch.Tensor:
    batch = work.task.collate([work.examples["eval"]], work.tokenizer.pad_token_id)
    with torch.no_grad():
        return net(**batch.inputs).logits

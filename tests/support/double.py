"""Training in double precision, where two ways to compute one number differ by 1e-12 and not by 1e-6."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

from lorasweep.lora import adapter


@contextmanager
def double_precision() -> Iterator[None]:
    """Keep what is in double precision so, and put each adapter on a base of it.

    Tasks ask for single precision before the loss, peft for it while it initialises, and Llama's norms for
    `.to(torch.float32)`: there a difference of 1e-16 becomes one of 6e-8 where it falls on a border.
    """
    single, converted, attach = torch.Tensor.float, torch.Tensor.to, adapter.attach

    def kept_double(tensor, *args, **kwargs):
        asked = (args, kwargs) == ((torch.float32,), {})
        return tensor if asked and tensor.dtype == torch.float64 else converted(tensor, *args, **kwargs)

    def attached_in_double(base, *args):
        base.model.to(torch.float32)
        attached = attach(base, *args)
        attached.peft_model.double()
        for weight in attached.swap.weights:
            weight.base.data = weight.base.data.double()
        attached.originals.update({n: w.double() for n, w in attached.originals.items()})
        attached.initial.update({n: w.double() for n, w in attached.initial.items()})
        for name in [n for n in attached.initial if ".lora_A." in n]:  # peft rounds it
            module = name.partition(".lora_")[0]
            layer = attached.peft_model.get_submodule(module)
            layer.get_base_layer().weight.data = adapter.residual(attached, module)
        return attached

    with (
        patch.object(adapter, "attach", attached_in_double),
        patch.object(torch.Tensor, "float", lambda t: t if t.dtype == torch.float64 else single(t)),
        patch.object(torch.Tensor, "to", kept_double),
    ):
        yield

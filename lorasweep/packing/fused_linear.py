"""The forward pass of LoRA layers, made for training: one fused product a layer, dropout from its own random stream.

peft stays the definition: its layers keep their parameters, and what `PackedForward` computes is what peft's own
forward computes, without the copies, and for the rows of several trials at once. Shapes: N rows times tokens, I
inputs, O outputs, R rank, K trials.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorasweep.lora.peft_names import Linear as LoraLinear
from lorasweep.models import quantization
from lorasweep.models.quantization import Reader
from lorasweep.packing.dropout import DropoutStream, StreamDropout

SMALL = 2**16
"""Elements of a mask that is kept as it is until the backward pass."""


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to a linear layer's output: s B A x, some of x dropped while it trains."""

    A_RI: Tensor
    B_OR: Tensor
    s: float
    p: float
    """Of dropout."""


@dataclass(frozen=True)
class Run:
    """Neighbours in a batch whose updates are done in one stacked product."""

    at: slice
    """Their rows times tokens; as many for each."""
    scales: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What a linear layer computes beside its frozen product, and for which rows times tokens."""

    runs: Sequence[Run]
    own: Sequence[tuple[slice, Tensor]] = ()
    """Frozen weights of some rows in place of the layer's."""
    starts: Sequence[tuple[slice, Tensor, Tensor]] = ()
    """A and s B that PiSSA and OLoRA took out of the weight of some rows."""
    biases: Sequence[slice] = ()
    """Rows whose trial trains the bias."""


class PackedForward(torch.autograd.Function):
    """`x W^T + b` for all rows, and each trial's `s (x * keep) A^T B^T` on its own rows; b and the W that `read`
    gives are frozen.

    `masks` tells for each run which inputs stay, one or zero, in the shape of their part of x; None where all do.
    `trained` holds the As and then the Bs of each run, then the biases. Ranks within a run are padded with zeros; a run
    of one trial has no dimension K. The rank is the first dimension of every low-rank product: as the last one it makes
    small ranks several times slower. Gradients are added to those of parameters that have one already, without a copy.

    Until the backward pass it keeps x, which neighbouring layers share, and a byte an element for each large mask;
    where fewer than half of the rows are a run's, x * keep of those.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        read: Reader,
        b_O: Tensor | None,
        plan: Plan,
        masks: Sequence[Tensor | None],
        *trained: Tensor,
    ) -> Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        y_NO = _frozen(x_NI, read(x.dtype).t(), [(at, own.t()) for at, own in plan.own], b_O)
        shared = 2 * sum(run.at.stop - run.at.start for run in plan.runs) >= len(x_NI)
        saved: list[Tensor | None] = [x_NI if shared else None]
        ctx.plan, ctx.ranks, first = plan, [f.shape[0] for f in trained], 0
        for run, mask in zip(plan.runs, masks, strict=True):
            K = len(run.scales)
            x_KNI = _apart(x_NI[run.at], K)
            keep = None if mask is None else mask.view(x_KNI.shape)
            kept_KNI = x_KNI if keep is None else x_KNI * keep
            A_KRI = _stacked(trained[first : first + K])
            B_KRO = _stacked([B_OR.t() for B_OR in trained[first + K : first + 2 * K]])
            low_KRN = _scaled(_product(A_KRI, kept_KNI.mT), run.scales)
            _add_product(_apart(y_NO[run.at], K), low_KRN.mT, B_KRO)
            saved += [low_KRN, A_KRI, B_KRO, _byte(keep), None if shared else kept_KNI]
            first += 2 * K
        for at, A_RI, B_OR in plan.starts:
            y_NO[at].addmm_(x_NI[at] @ A_RI.t(), B_OR.t(), alpha=-1)
        for at, own_O in zip(plan.biases, trained[first:], strict=True):
            y_NO[at] += own_O
        ctx.save_for_backward(*saved)
        ctx.read = read
        ctx.present = [f.grad if f.is_leaf else None for f in trained]
        return y_NO.resize_(*x.shape[:-1], y_NO.shape[-1])  # no view: a model may change it in place

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        (x_NI, *saved), plan = ctx.saved_tensors, ctx.plan
        slope_NO = slope.reshape(-1, slope.shape[-1])
        grad_NI = _frozen(slope_NO, ctx.read(slope.dtype), plan.own) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = []
        for i, run in enumerate(plan.runs):
            low_KRN, A_KRI, B_KRO, byte, kept_KNI = saved[5 * i : 5 * i + 5]
            K = len(run.scales)
            keep = None if byte is None else byte.to(low_KRN.dtype)
            if kept_KNI is None:
                x_KNI = _apart(x_NI[run.at], K)
                kept_KNI = x_KNI if keep is None else x_KNI * keep
            slope_KNO = _apart(slope_NO[run.at], K)
            low_slope_KRN = _scaled(_product(B_KRO, slope_KNO.mT), run.scales)
            present, first = ctx.present[len(grads) : len(grads) + 2 * K], len(grads)
            ranks = ctx.ranks[first : first + K]
            grads += _gradients(low_slope_KRN, kept_KNI, ranks, present[:K])
            grads_B = _gradients(low_KRN, slope_KNO, ranks, [None if g is None else g.t() for g in present[K:]])
            grads += [None if g is None else g.t() for g in grads_B]
            if grad_NI is not None:
                grad_KNI = _apart(grad_NI[run.at], K)
                if keep is None:
                    _add_product(grad_KNI, low_slope_KRN.mT, A_KRI)
                else:
                    grad_KNI.addcmul_(_product(low_slope_KRN.mT, A_KRI), keep)
        if grad_NI is not None:
            for at, A_RI, B_OR in plan.starts:
                grad_NI[at].addmm_(slope_NO[at] @ B_OR, A_RI, alpha=-1)
        grads += [slope_NO[at].sum(0) for at in plan.biases]
        grad_x = None if grad_NI is None else grad_NI.view(*slope.shape[:-1], grad_NI.shape[-1])
        return grad_x, None, None, None, None, *grads


def _apart(rows_NI: Tensor, trials: int) -> Tensor:
    """Return each trial's rows; of one trial, as they are."""
    return rows_NI if trials == 1 else rows_NI.view(trials, -1, rows_NI.shape[1])


def _product(left: Tensor, right: Tensor) -> Tensor:
    return torch.mm(left, right) if left.dim() == 2 else torch.bmm(left, right)


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    (to.addmm_ if left.dim() == 2 else to.baddbmm_)(left, right)


def _gradients(
    left: Tensor, right: Tensor, ranks: Sequence[int], present: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return each trial's product of R x N with N x anything, without what padded the rank; None where it was added to
    the gradient that is there.
    """
    if left.dim() == 2 and present[0] is not None:
        present[0].addmm_(left, right)
        return [None]
    found: list[Tensor | None] = []
    products = _product(left, right)
    for grad, rank, there in zip(products.view(len(ranks), -1, products.shape[-1]), ranks, present, strict=True):
        found.append(grad[:rank] if there is None else None)
        if there is not None:
            there += grad[:rank]
    return found


def _frozen(x_NI: Tensor, W_IO: Tensor, own: Sequence[tuple[slice, Tensor]], b_O: Tensor | None = None) -> Tensor:
    """Return x W + b, with other weights than W for some rows."""
    if not own:
        return x_NI @ W_IO if b_O is None else torch.addmm(b_O, x_NI, W_IO)
    y_NO, done = x_NI.new_empty(len(x_NI), W_IO.shape[1]), 0
    for at, other_IO in [*own, (slice(len(x_NI), len(x_NI)), W_IO)]:
        for rows, weight in ((slice(done, at.start), W_IO), (at, other_IO)):
            if rows.start < rows.stop:
                torch.mm(x_NI[rows], weight, out=y_NO[rows])
        done = at.stop
    return y_NO if b_O is None else y_NO.add_(b_O)


def _byte(keep: Tensor | None) -> Tensor | None:
    """Return a mask as it waits for the backward pass: bytes, where that is worth their making."""
    if keep is None or not keep.is_floating_point() or keep.numel() <= SMALL:
        return keep
    return keep.to(torch.uint8)


def _scaled(low_KRN: Tensor, scales: tuple[float, ...]) -> Tensor:
    """Multiply each trial's part in place."""
    if min(scales) == max(scales):
        return low_KRN.mul_(scales[0])
    return low_KRN.mul_(_column(scales, low_KRN.dtype, low_KRN.device))


@functools.lru_cache(maxsize=256)
def _column(scales: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(scales, dtype=dtype, device=device)[:, None, None]


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Return the matrices as one tensor, zeros where a rank, their first dimension, is smaller than the largest; a
    single one as it is.
    """
    if len(matrices) == 1:
        return matrices[0]
    ranks = [len(m) for m in matrices]
    if min(ranks) == max(ranks):
        return torch.stack(list(matrices))
    out = matrices[0].new_zeros(len(matrices), max(ranks), matrices[0].shape[1])
    for place, matrix in zip(out, matrices, strict=True):
        place[: len(matrix)].copy_(matrix)
    return out


def install(peft_model: Any, stream: DropoutStream) -> None:
    """Give the model's plain LoRA layers the fused forward and all of its adapters' dropout the stream."""
    for layer in _lora_layers(peft_model):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = StreamDropout(dropout.p, stream)
        if is_plain(layer) and not any(p.requires_grad for p in layer.base_layer.parameters()):
            layer.forward = functools.partial(_forward, layer, update(layer), stream)


def _lora_layers(peft_model: Any) -> Iterator[Any]:
    return (m for m in peft_model.modules() if hasattr(m, "lora_dropout") and hasattr(m, "base_layer"))


def is_plain(layer: Any) -> bool:
    """Tell whether a layer adds s B A x to a linear layer's output, and does nothing else."""
    known = type(layer) is LoraLinear or type(layer).__module__ == "peft.tuners.lora.bnb"
    one = known and len(layer.lora_A) == 1 and quantization.is_linear(layer.base_layer)
    return one and not layer.lora_variant and not any(layer.lora_bias.values())


def update(layer: Any) -> Update:
    """Return what a plain layer adds."""
    (name,) = layer.lora_A.keys()
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, StreamDropout) else 0.0
    return Update(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p)


def _forward(layer: Any, added: Update, stream: DropoutStream, x: Tensor) -> Tensor:
    base = layer.base_layer
    if layer.disable_adapters or layer.merged:
        return base(x)
    p = added.p if stream.on else 0.0
    keep = stream.keep(x, p) if p else None
    plan = Plan([Run(slice(0, x.numel() // x.shape[-1]), (added.s / (1 - p),))])
    trained = added.A_RI.to(x.dtype), added.B_OR.to(x.dtype)
    return PackedForward.apply(x, quantization.reader(base), base.bias, plan, [keep], *trained)

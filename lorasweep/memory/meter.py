"""Counts the bytes of tensors that are alive while code runs on the meta device, where tensors have no data.

Tensors that hold data (masks, labels, lengths) may be mixed in: what is computed of them alone is really computed, so
that a model may look at them; what meets a meta tensor becomes one.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

META = torch.device("meta")
aten = torch.ops.aten

COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)
"""Make positions: models look at whether they follow on one another."""

INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index_put.default)


class Meter(TorchDispatchMode):
    """While it is on, counts what is alive, by kind, and remembers the highest moment."""

    def __init__(self, words: int = 0) -> None:
        """Tensors whose last dimension is `words` long are counted as logits."""
        super().__init__()
        self._words = words
        self._held: dict[int, tuple[weakref.ref, int, str]] = {}
        self.now: Counter[str] = Counter()
        """Bytes by kind."""
        self.peak: Counter[str] = Counter()

    def hold(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as of this kind, those that are counted already too."""
        for tensor in tensors:
            self._watch(tensor, kind)
            key = tensor.untyped_storage()._cdata
            ref, size, before = self._held[key]
            self._held[key] = ref, size, kind
            self.now[before] -= size
            self.now[kind] += size

    def begin(self) -> None:
        """Forget the peak so far."""
        self.peak = Counter(self.now)

    def _watch(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = weakref.ref(storage, functools.partial(self._gone, key)), storage.nbytes(), kind
        self.now[kind] += storage.nbytes()
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def _gone(self, key: int, _: Any) -> None:
        _, size, kind = self._held.pop(key)
        self.now[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        args, kwargs = _together(func, args, dict(kwargs or {}))
        if func is aten.logsumexp.default:  # its kernel makes exp(x - max) of its own
            self._watch(torch.empty_like(args[0]), self._kind(args[0]))
        out = func(*args, **kwargs)
        tree_map_only(Tensor, lambda t: self._watch(t, self._kind(t)), out)
        return out

    def _kind(self, tensor: Tensor) -> str:
        whole = tensor.dim() > 1 and tensor.shape[-1] == self._words and tensor.is_floating_point()
        return "logits" if whole else "activations"


def _together(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return arguments on one device: meta where any is on it. A copy to it keeps its data."""
    if func is aten._to_copy.default and args[0].device != META and kwargs.get("device") == META:
        return args, {**kwargs, "device": None}
    if func in COUNTING and kwargs.get("device") == META:
        return args, {**kwargs, "device": None}
    found: list[torch.device] = []
    tree_map_only(Tensor, lambda t: found.append(t.device), (args, kwargs))
    if len(set(found)) < 2:
        return args, kwargs
    if func in INDEXING:
        args = (args[0], _places(args[1]), *args[2:])
    return tree_map_only(Tensor, _as_meta, args), tree_map_only(Tensor, _as_meta, kwargs)


def _as_meta(tensor: Tensor) -> Tensor:
    return tensor if tensor.device == META else torch.empty_like(tensor, device=META)


def _places(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Return indices with the masks as numbers: how many places a mask has is in its data."""
    out: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            out += index.nonzero(as_tuple=True)
        else:
            out.append(index)
    return out


@contextmanager
def fused_attention() -> Iterator[None]:
    """Let attention keep what the fused kernels keep; on the meta device torch takes the plain formula, with its
    B x H x T x T matrix. To be left when the backward pass has ended: layers may compute again in it.
    """
    own = nn.functional.scaled_dot_product_attention

    def fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *rest: Any, **more: Any
    ) -> Any:
        if query.device != META:
            return own(query, key, value, attn_mask, *rest, **more)
        return _Attention.apply(query, key, value, attn_mask)

    nn.functional.scaled_dot_product_attention = fused
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = own


class _Attention(torch.autograd.Function):
    """The shapes of fused attention: queries, keys, values, output and one number a query are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        B, H, T, _ = query.shape
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype, device=META)
        out = query.new_empty(B, T, H, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, mask, out, query.new_empty(B, H, T, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None

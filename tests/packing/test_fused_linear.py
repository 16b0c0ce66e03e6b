"""The fused LoRA forward against peft's own, and the dropout stream."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lorasweep.packing import dropout, fused_linear


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def adapted(dropout: float, **config):
    torch.manual_seed(0)
    wanted = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["first", "second"], init_lora_weights=False, **config
    )
    return get_peft_model(Two().double(), wanted)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x.grad = None
    model.zero_grad()
    model(x).square().sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return found | {"x": x.grad.clone()}


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"bias": "all"}, {"use_dora": True}, {"lora_bias": True}])
def test_fused_forward_and_every_gradient_equal_pefts(config):
    model = adapted(0.0, **config)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    expected, slopes = model(x), gradients(model, x)
    fused_linear.install(model, dropout.DropoutStream(torch.device("cpu")))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    found = gradients(model, x)
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("small", [0, fused_linear.SMALL])
def test_fused_dropout_equals_dropping_the_input_with_the_same_mask(monkeypatch, small):
    """The slow way: peft's forward with StreamDropout as a module, against the fused one; masks kept as bytes and as
    they are.
    """
    monkeypatch.setattr(fused_linear, "SMALL", small)
    x = torch.randn(3, 5, 12, dtype=torch.float64, requires_grad=True)
    stream = dropout.DropoutStream(torch.device("cpu"))
    model = adapted(0.4)
    fused_linear.install(model, stream)
    stream.on = True
    stream.at(7, 3)
    fused = gradients(model, x)
    for layer in model.modules():
        layer.__dict__.pop("forward", None)
    stream.at(7, 3)
    slow = gradients(model, x)
    for name, slope in slow.items():
        torch.testing.assert_close(fused[name], slope, rtol=1e-10, atol=1e-12, msg=name)
    stream.on = False
    assert not torch.equal(gradients(model, x)["x"], slow["x"])


@pytest.mark.parametrize("adapted_rows", [4, 1])
def test_what_waits_for_the_backward_pass_is_small(monkeypatch, adapted_rows):
    """The input once, and masks as bytes; where few rows are adapted, those alone."""
    monkeypatch.setattr(fused_linear, "SMALL", 0)
    x_NI, A_RI, B_OR = torch.randn(4, 10), torch.randn(2, 10, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    keep = (torch.rand(adapted_rows, 10) > 0.5).to(x_NI.dtype)
    plan = fused_linear.Plan([fused_linear.Run(slice(0, adapted_rows), (0.5,))])
    kept: list[torch.Tensor] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    W_OI = torch.randn(6, 10)
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda t: t):
        y_NO = fused_linear.PackedForward.apply(x_NI, lambda _: W_OI, None, plan, [keep], A_RI, B_OR)
    y_NO.sum().backward()
    assert B_OR.grad is not None
    torch.testing.assert_close(B_OR.grad, 0.5 * ((x_NI[:adapted_rows] * keep) @ A_RI.t()).sum(0).expand(6, 2))
    assert [t.dtype for t in kept if t.shape[-2:] == keep.shape and not t.is_floating_point()] == [torch.uint8]
    whole = [t for t in kept if t.untyped_storage().data_ptr() == x_NI.untyped_storage().data_ptr()]
    assert len(whole) == (1 if adapted_rows == 4 else 0)
    factors = A_RI.numel() + B_OR.numel() + 2 * adapted_rows
    assert sum(t.numel() for t in kept if t.is_floating_point()) == factors + 10 * adapted_rows


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_mask_keeps_the_right_share(p):
    stream = dropout.DropoutStream(torch.device("cpu"))
    stream.at(0, 0)
    kept = stream.keep(torch.empty(1000, 1003), p).double().mean().item()
    assert kept == pytest.approx(1 - p, abs=5 * (p * (1 - p) / 1_003_000) ** 0.5 + 1 / dropout.LEVELS)


def test_mask_depends_on_seed_and_step_alone():
    stream = dropout.DropoutStream(torch.device("cpu"))
    like = torch.empty(100, 7)

    def mask(seed: int, step: int) -> torch.Tensor:
        stream.at(seed, step)
        return stream.keep(like, 0.5)

    first = mask(1, 2)
    assert torch.equal(mask(1, 2), first)
    assert not torch.equal(mask(1, 3), first)
    assert not torch.equal(mask(2, 2), first)


@pytest.mark.parametrize("ranks", [[2], [2, 3], [3, 3]])
def test_gradients_are_added_to_what_is_there_without_a_copy(ranks):
    """As autograd would add them; a parameter keeps the tensor that it has as its gradient."""
    torch.manual_seed(0)
    K, rows = len(ranks), 4
    x_NI, W_OI = torch.randn(K * rows, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    shapes = [(r, 10) for r in ranks] + [(6, r) for r in ranks]
    plan = fused_linear.Plan([fused_linear.Run(slice(0, K * rows), tuple(0.5 + k for k in range(K)))])

    def found(factors: list[torch.Tensor]) -> None:
        y_NO = fused_linear.PackedForward.apply(x_NI, lambda _: W_OI, None, plan, [None], *factors)
        y_NO.square().sum().backward()

    fresh = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    kept = [f.detach().clone().requires_grad_() for f in fresh]
    before = [torch.randn(s, dtype=torch.float64) for s in shapes[:K]]
    before += [torch.randn(s[::-1], dtype=torch.float64).t() for s in shapes[K:]]  # as flat.py lays them
    for f, gradient in zip(kept, before, strict=True):
        f.grad = gradient.clone()
    places = [f.grad.data_ptr() for f in kept]
    found(fresh)
    found(kept)
    assert [f.grad.data_ptr() for f in kept] == places
    for one, other, gradient in zip(fresh, kept, before, strict=True):
        torch.testing.assert_close(other.grad, gradient + one.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [(2,), (3, 3), (2, 5, 3)])
@pytest.mark.parametrize("dropped", [False, True])
def test_stacked_trials_have_the_outputs_and_gradients_of_each_by_itself(ranks, dropped):
    """Whatever pads the smaller ranks, and whatever the neighbours are scaled by."""
    torch.manual_seed(0)
    rows, scales = 4, [0.5 + k for k in range(len(ranks))]
    x_NI, W_OI = torch.randn(len(ranks) * rows, 10, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    keep_NI = (torch.rand(x_NI.shape) > 0.3).to(x_NI.dtype) if dropped else torch.ones_like(x_NI)
    As = [torch.randn(r, 10, dtype=torch.float64, requires_grad=True) for r in ranks]
    Bs = [torch.randn(6, r, dtype=torch.float64, requires_grad=True) for r in ranks]
    x_NI.requires_grad_()

    plan = fused_linear.Plan([fused_linear.Run(slice(0, len(x_NI)), tuple(scales))])
    masks = [keep_NI if dropped else None]
    stacked = fused_linear.PackedForward.apply(x_NI, lambda _: W_OI, None, plan, masks, *As, *Bs)
    kept = (x_NI * keep_NI).split(rows)
    updates = [s * x @ A_RI.t() @ B_OR.t() for s, x, A_RI, B_OR in zip(scales, kept, As, Bs, strict=True)]
    single = x_NI @ W_OI.t() + torch.cat(updates)
    torch.testing.assert_close(stacked, single, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad(y_NO.square().sum(), [x_NI, *As, *Bs]) for y_NO in (stacked, single))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)

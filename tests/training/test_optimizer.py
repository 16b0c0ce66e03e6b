"""AdamW on long tensors does what AdamW does on each parameter."""

import pytest
import torch
from torch import nn

from lorasweep.config import compose
from lorasweep.training import optimizer as optimizer_module


def twins() -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = {
        "a.lora_A.default.weight": (3, 7),
        "a.lora_B.default.weight": (5, 3),
        "head.weight": (2, 5),
        "head.bias": (2,),
    }
    one = {n: nn.Parameter(torch.randn(s, dtype=torch.float64)) for n, s in shapes.items()}
    return one, {n: nn.Parameter(p.detach().clone()) for n, p in one.items()}


def test_steps_and_norms_equal_those_of_separate_parameters():
    spec = compose.compose_trial(["train.weight_decay=0.1", "lora.loraplus_lr_ratio=4", "train.learning_rate=0.01"])
    ours, theirs = twins()
    made = optimizer_module.optimizer(ours, spec)
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0, "lr": 0.01 * (4 if "lora_B" in n else 1)}
        for n, p in theirs.items()
    ]
    train = spec.train
    reference = torch.optim.AdamW(groups, betas=(train.adam_beta1, train.adam_beta2), eps=train.adam_epsilon)
    for group in made.param_groups:
        group["lr"] = 0.01 * group["lr_ratio"]
    for step in range(5):
        for named in (ours, theirs):
            sum((p * (i + step)).sin().sum() for i, p in enumerate(named.values())).backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        (found,) = optimizer_module.norms([made])
        assert found == pytest.approx(float(norm), rel=1e-12)
        made.clip(found, 1.0)
        for optimizer in (made, reference):
            optimizer.step()
            optimizer.zero_grad()
        for name, p in theirs.items():
            torch.testing.assert_close(ours[name], p, rtol=1e-12, atol=1e-12)
    assert len(made.flats()) == 3, "decayed, decayed and faster, not decayed"


def test_parameter_without_a_gradient_counts_as_zero():
    spec = compose.compose_trial(["train.weight_decay=0"])
    ours, _ = twins()
    made = optimizer_module.optimizer(ours, spec)
    before = ours["head.weight"].detach().clone()
    ours["a.lora_A.default.weight"].sum().backward()
    made.step()
    assert torch.equal(ours["head.weight"], before)


def test_norms_are_each_ones_own():
    made = [optimizer_module.optimizer(twins()[0], compose.compose_trial([])) for _ in range(3)]
    for value, one in zip((1.0, 2.0, float("inf")), made, strict=True):
        one.flats()[0].grad[0] = value
    assert optimizer_module.norms(made) == [1.0, 2.0, float("inf")]
    assert optimizer_module.norms([]) == []


def test_B_and_its_gradient_lie_with_the_rank_first():
    ours, theirs = twins()
    optimizer_module.optimizer(ours, compose.compose_trial([]))
    for name, p in ours.items():
        assert p.grad is not None
        assert p.shape == p.grad.shape == theirs[name].shape
        assert p.stride() == p.grad.stride() == ((1, len(p)) if "lora_B" in name else theirs[name].stride())
        assert torch.equal(p, theirs[name])

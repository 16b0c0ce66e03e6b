"""Arithmetic of a step against the device's matmul: the count by hand, and bounds that no machine leaves."""

import pytest
import torch
from torch import nn

from lorasweep import peak


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.adapter = nn.Linear(6, 4), nn.Linear(4, 50), nn.Linear(6, 2)
        self.embedding = nn.Embedding(50, 6)
        self.first.requires_grad_(False)
        self.head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def test_frozen_weights_count_four_times_and_trained_ones_six_times():
    assert peak.flops_a_token(Tiny(), trained=12) == 4 * 6 * 4 + 6 * 12


def test_share_grows_with_tokens_and_falls_with_time():
    model = Tiny()
    one = peak.share(model, 12, tokens=1000, seconds=1.0)
    assert 0 < one < 1
    assert peak.share(model, 12, tokens=2000, seconds=1.0) == pytest.approx(2 * one)
    assert peak.share(model, 12, tokens=1000, seconds=2.0) == pytest.approx(one / 2)
    assert peak.share(model, 12, tokens=0, seconds=0.0) == 0.0


def test_peak_is_measured_once_and_is_that_of_a_real_machine():
    found = peak.matmul_peak(torch.device("cpu"), torch.float32)
    assert 1e8 < found < 1e15
    assert peak.matmul_peak(torch.device("cpu"), torch.float32) == found

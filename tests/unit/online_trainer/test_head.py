"""The output layer in chunks: the same numbers and gradients as all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from online_trainer import head


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_all_logits_at_once(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "CHUNK", 4)  # 11 positions: the last chunk is not full
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 30, bias=bias)
    hidden, target, pull = torch.randn(11, 8, requires_grad=True), torch.randint(30, (11,)), torch.randn(11)
    logps, sharpness = head.token_logps(layer, hidden, target)
    (logps * pull).sum().backward()
    found, hidden.grad = hidden.grad, None
    wanted = -cross_entropy(layer(hidden), target, reduction="none")
    (wanted * pull).sum().backward()
    torch.testing.assert_close(logps, wanted)
    torch.testing.assert_close(found, hidden.grad)
    torch.testing.assert_close(sharpness, layer(hidden).softmax(-1).square().sum(-1).log().detach())
    assert layer.weight.grad is not None  # by the plain way alone
    assert not sharpness.requires_grad


def test_the_frozen_layer_gets_no_gradient() -> None:
    layer = torch.nn.Linear(4, 9)
    logps, _ = head.token_logps(layer, torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 8]))
    logps.sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is None

"""Divergence against examples worked by hand."""

import math

import pytest
import torch

from kvcapsule.eval.divergence import divergence


def test_divergence_by_hand() -> None:
    full = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]).log()
    method = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]).log()
    # Logits are known but for a constant.
    method[0] += 7.0
    there = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    back = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    torch.testing.assert_close(
        divergence(full, method), torch.tensor([there, back, 0.0], dtype=torch.float64), atol=1e-6, rtol=0
    )


def test_divergence_where_a_token_is_impossible() -> None:
    full, method = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])
    assert divergence(full, method).item() == pytest.approx(math.log(2))
    assert divergence(method, full).item() == torch.inf
    assert divergence(full, full).item() == 0.0

"""Metrics against examples worked by hand."""

import math

import pytest
import torch

from kvcapsule.eval.metrics import accuracy, character_error_rate, divergence, edit_distance


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ("", "", 0),
        ("abc", "", 3),
        ("", "abc", 3),
        ("kitten", "sitting", 3),
        ("flaw", "lawn", 2),
        ("ab", "ba", 2),
        ("same", "same", 0),
    ],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == distance
    assert edit_distance(list(b), list(a)) == distance


def test_character_error_rate_counts_per_character_of_the_right_text() -> None:
    assert character_error_rate("ant 13", "ant 12") == pytest.approx(1 / 6)
    assert character_error_rate("ant 1", "ant 12") == pytest.approx(1 / 6)
    assert character_error_rate("aaaa", "b") == 4.0
    assert character_error_rate("", "") == 0.0


@pytest.mark.parametrize(
    ("task", "answer", "right", "score"),
    [
        ("transcribe", "ant 12\nbee 34", "ant 12\nbee 34", 1.0),
        ("transcribe", "ant 12\nbee 35\n", "ant 12\nbee 34", 1 - 1 / 13),
        ("transcribe", "rambling on and on", "ant", 0.0),
        ("value", " 341\n", "341", 1.0),
        ("value", "342", "341", 0.0),
        ("count", "1", "10", 0.0),
        ("count", "42(1)\n2(2)\n2", "4\n7\n2", 1.0),
        ("count", "42(1)\n2(2)\n3", "42(1)\n2(2)\n2", 0.0),
        ("lookup", "ant\nfox 42", "ant\nbee\nfox 42", 1.0),
        ("lookup", "ant\nfox", "ant\nfox 42", 0.0),
        ("lookup", "", "42", 0.0),
        ("line", "Ant 12", "ant 12", 0.0),
    ],
)
def test_accuracy(task: str, answer: str, right: str, score: float) -> None:
    assert accuracy(task, answer, right) == pytest.approx(score)


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

"""What a row lost, and its confidence intervals, against figures worked by hand and against drawn samples."""

from typing import Any

import numpy as np
import pytest

from kvcapsule.eval.report.losses import loss_of


def _row(accuracy: float, agreement: float, count: int = 100) -> dict[str, Any]:
    return {"accuracy": {"a": accuracy, "b": accuracy}, "agreement": agreement, "n": count}


FULL = _row(0.9, 1.0)


def test_by_hand() -> None:
    loss = loss_of(_row(0.85, 0.8), FULL)
    assert loss.points == pytest.approx(5)
    assert loss.changed == pytest.approx(0.2)
    # Wilson's interval of 20 of 100.
    assert (loss.changed_low, loss.changed_high) == pytest.approx((0.1334, 0.2888), abs=1e-4)
    # 1.96 standard errors of a variance of 22 / 104 - 0.05^2 among 100.
    assert loss.points_margin == pytest.approx(100 * 1.96 * ((22 / 104 - 0.0025) / 100) ** 0.5)


def test_no_change_among_few_questions_is_no_certainty() -> None:
    loss = loss_of(_row(0.9, 1.0), FULL)
    assert loss.points == loss.changed == loss.changed_low == 0
    assert 2 < loss.points_margin < 4 and 0.03 < loss.changed_high < 0.04


def test_everything_lost() -> None:
    loss = loss_of(_row(0.0, 0.0), _row(1.0, 1.0))
    assert loss.points == 100 and loss.points_margin == 0 and loss.changed_high == 1 > loss.changed_low > 0.96


def test_won_points_are_negative() -> None:
    assert loss_of(_row(0.95, 0.9), FULL).points == pytest.approx(-5)


@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.0), (0.05, 0.03), (0.4, 0.1)])
def test_the_intervals_hold_the_truth(lost: float, won: float) -> None:
    """In 92 of 100 drawn runs of 200 questions at least, where answers change for the worse, the better or not."""
    generator = np.random.default_rng(0)
    held = [0, 0]
    for _ in range(400):
        kinds = generator.choice(3, size=200, p=[lost, won, 1 - lost - won])
        worse, better = float((kinds == 0).mean()), float((kinds == 1).mean())
        loss = loss_of(_row(0.5 - worse + better, 1 - worse - better, 200), _row(0.5, 1.0, 200))
        held[0] += abs(loss.points - 100 * (lost - won)) <= loss.points_margin
        held[1] += loss.changed_low <= lost + won <= loss.changed_high
    assert min(held) >= 0.92 * 400

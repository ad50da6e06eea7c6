"""The file with the digests of a capsule's training rows."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from support.capsule_files import FILES, fixed_capsule

from kvcapsule import Capsule, CapsuleError
from kvcapsule.capsule import training_rows
from kvcapsule.capsule.training_rows import ROWS_FILE, Seen, TrainingRows


def test_rows_come_back_from_a_folder(tmp_path: Path) -> None:
    rows = TrainingRows.of([5, -3, 5, 2**63 - 1, -(2**63)])
    assert rows.digests.tolist() == [-(2**63), -3, 5, 2**63 - 1] and rows.total == 4
    fixed_capsule().save_pretrained(tmp_path / "c", training_rows=rows)
    assert set(os.listdir(tmp_path / "c")) == FILES | {ROWS_FILE}
    back = TrainingRows.in_folder(tmp_path / "c")
    assert back is not None and back.to_bytes() == rows.to_bytes()
    assert back.seen([5, 6, 5, -3]) == Seen(3, 4) and back.seen([5, 6]).share == 0.5
    Capsule.from_pretrained(tmp_path / "c")
    # A capsule that knows nothing of its rows replaces one that does.
    fixed_capsule().save_pretrained(tmp_path / "c")
    assert set(os.listdir(tmp_path / "c")) == FILES and TrainingRows.in_folder(tmp_path / "c") is None


def test_of_very_many_rows_a_part_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_rows, "MOST", 1000)
    rng = np.random.default_rng(0)
    learned, others = (rng.integers(-(2**63), 2**63 - 1, 5000) for _ in range(2))
    rows = TrainingRows.of(learned.tolist())
    assert len(rows.digests) == 1000 and rows.total == 5000
    half = rows.seen([*learned[:500].tolist(), *others[:500].tolist()])
    assert half.share == pytest.approx(0.5, abs=0.1) and 120 < half.rows < 280
    assert rows.seen(others.tolist()).share == 0 and rows.seen([2**63 - 1]) == Seen(0, 0)
    assert rows.seen([2**63 - 1]).share is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (TrainingRows.of(range(9)).to_bytes()[:-1], "cannot be read"),
        (b"\0" * 10**6, "1,000,000 bytes, more than"),
        (save({"digests": np.arange(3), "total": np.array([3])}), "not a list of training rows"),
        (TrainingRows(np.array([3, 2, 1]), 3).to_bytes(), "is damaged"),
        (TrainingRows(np.array([1, 2, 3]), 4).to_bytes(), "is damaged"),
        (TrainingRows(np.array([1.0, 2.0]), 2).to_bytes(), "is damaged"),  # type: ignore[arg-type]
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / ROWS_FILE).write_bytes(content)
    with pytest.raises(CapsuleError, match=says):
        TrainingRows.in_folder(tmp_path)

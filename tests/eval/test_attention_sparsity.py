"""The sparsity of each layer's attention: what the command measures, writes and refuses."""

import json
from pathlib import Path

import pytest

from kvcapsule.eval.studies import attention_sparsity


def test_every_layer_has_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A greater threshold counts more entries as zero."""
    found = []
    for threshold in ("0.01", "0.5"):
        words = ["--data.size", "6", "--batch", "4", "--threshold", threshold, "--json", str(tmp_path / "s.json")]
        assert attention_sparsity.main(words) == 0
        found.append(json.loads((tmp_path / "s.json").read_text()))
    assert [row["layer"] for row in found[0]["rows"]] == [0, 1, 2, 3] and found[0]["n"] == 6
    for low, high in zip(found[0]["rows"], found[1]["rows"], strict=True):
        assert 0 <= low["least"] <= low["mean"] <= low["greatest"] <= 1
        assert low["mean"] < high["mean"]
    assert "sparsity of pages-vlm, 6 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--threshold", "1"], "between 0 and 1"),
        (["--batch", "0"], "at least 1"),
        (["--model", "no/such"], "cannot load the model"),
    ],
)
def test_bad_input_is_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention_sparsity.main(words) == 2
    assert says in capsys.readouterr().err

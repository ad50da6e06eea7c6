"""The last lines of a training: what was stored, whether that is good, and what comes next; and no capsule without
numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.checkpoints import shipped_names
from kvcapsule.training.main import main
from kvcapsule.training.summary import verdict, yardsticks

QUICK = ["--data.size", "24", "--held-out", "8", "--batch", "4", "--moment-batches", "4", "--device", "cpu"]
CODES = ["--transform.logit-batches", "0", "--transform.query-bank", "0", "--transform.kl-weight", "0"]


def test_the_last_lines_say_what_is_stored_and_what_comes_next(
    vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "my capsule"
    words = ["transform", "--model", vlm, "--output", f"{output}/", *QUICK, *CODES, "--codec.tile", "64"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert not shown.out
    *_, before, unexplained, judged, saved, following = shown.err.splitlines()
    assert before.split()[0] == "mean" and unexplained.startswith("Unexplained: the share of the variance")
    error = json.loads((output / "metrics.json").read_text())["train"]["output_error"]
    assert judged.startswith(f"An output error of {error:.4f} is poor (pages-vlm-cross-layer: 0.0022, 99.8% of answers")
    # Four tokens of 196 are raw, in float32: of twenty, eleven are left.
    assert re.fullmatch(
        rf"capsule saved to {output} \(\d+ s\): [\d.]+ kB of weights, stores 11.1x less than a cache of 16 bits"
        r" \(18,0\d\d of 200,704 bytes an image\)\.",
        saved,
    )
    assert following == f"next: kvcapsule eval --capsule '{output}'"
    # On a pipe, where nothing moves: stages of so many.
    assert "moments of keys and values: 4 of 4" in shown.err and "held-out batches: 2 of 2" in shown.err
    assert "Epoch" not in shown.err
    assert "4 tokens fill no tile and stay raw: 11.1x is stored in all" in shown.err


def test_an_error_is_good_by_what_shipped_capsules_lose() -> None:
    good, fair = yardsticks()
    assert good.output_error < fair.output_error and good.same_answers > fair.same_answers > 0.9
    words = [verdict(error).split(" is ")[1].split()[0] for error in (good.output_error, fair.output_error, 0.2)]
    assert words == ["good", "fair", "poor"]
    assert "lower --compression" in verdict(0.2) and "lower --compression" not in verdict(0.0)


@pytest.mark.parametrize(
    ("family", "words", "option"),
    [
        ("transform", [*CODES, "--transform.steps", "4", "--transform.lr", "1e30"], "--transform.lr than 1e+30"),
        ("kvcapsule", ["--optim.soft_steps", "0", "--optim.hard_steps", "4", "--optim.lr", "1e30"], "--optim.lr than"),
    ],
)
def test_a_descent_that_diverges_is_not_saved(
    family: str, words: list[str], option: str, vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "c"
    output.mkdir()
    assert main([family, "--model", vlm, "--output", str(output), "--force", *QUICK, "--codec.tile", "28", *words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kvcapsule train: training diverged: ") and f"start again with a lower {option}" in line
    assert not list(output.iterdir())


@pytest.mark.parametrize("name", [name for name in shipped_names() if name.startswith("pages-vlm-")])
def test_shipped_capsules_are_finite(name: str) -> None:
    assert all(t.isfinite().all() for t in Capsule.from_pretrained(name).state_dict().values() if t.is_floating_point())


def test_numbers_that_are_not_finite_are_seen_in_the_capsule_too(
    vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the last step leaves them, whose loss was finite."""
    from kvcapsule.training.families.transform import TransformFit

    def ruin(self) -> None:
        with torch.no_grad():
            next(self.layers.parameters()).fill_(float("nan"))

    output = tmp_path / "c"
    words = ["transform", "--model", vlm, "--output", str(output), *QUICK, *CODES, "--codec.tile", "28"]
    assert main(words) == 0
    was = load_file(output / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(TransformFit, "finish", ruin)
        assert main([*words, "--force"]) == 2
    assert "holds numbers that are not finite" in capsys.readouterr().err
    now = load_file(output / "model.safetensors")
    assert all(torch.equal(now[name], tensor) for name, tensor in was.items())

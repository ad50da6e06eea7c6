"""Training of a cross-layer code: what it codes together, what it buys, gradients to every layer, bytes and wrong
input."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from kvcapsule import Capsule
from kvcapsule.training.main import main

QUICK = [
    "--data.size",
    "48",
    "--held_out",
    "8",
    "--batch",
    "8",
    "--moment_batches",
    "5",
    "--codec.tile",
    "28",
    "--threads",
    "1",
]
QUICK += ["--transform.logit_batches", "2"]


def run(family: str, output: Path, *options: str) -> dict[str, float]:
    assert main([family, *QUICK, "--compression", "20", "--output", str(output), *options]) == 0
    metrics: dict[str, float] = yaml.safe_load((output / "metrics.json").read_text())["train"]
    return metrics


def test_a_short_training_gives_a_capsule_of_the_bytes_asked_for_and_moves_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        run("cross-layer", tmp_path / name, "--transform.steps", steps)
        for name, steps in (("form", "0"), ("moved", "3"))
    )
    form, moved = (Capsule.from_pretrained(tmp_path / name) for name in ("form", "moved"))
    # The frame and the owner of each tile are paid for out of the same bytes.
    paid = 16 / 20 - (8 + 4 * 32) * 8 / (28 * 2 * 32 * 2 * 4)
    assert form.config.codec.bits == moved.config.codec.bits == pytest.approx(paid, rel=0.004)
    assert form.config.codec.joint_layers == 4 and form.config.codec.joint_heads == 2
    for name, was in form.layers[0].transform.named_parameters():
        changed = (moved.layers[0].transform.get_parameter(name) - was).abs()
        parts = changed.flatten(1).amax(1) if name.startswith("channels") else changed.amax()[None]
        assert bool((parts > 0).all()), name
    assert max(before["kl"], after["kl"]) < 0.1


def test_layers_together_lose_less_than_apart(tmp_path: Path) -> None:
    """At the same bytes: the keys and values of two layers, then of all four, against every unit by itself."""
    apart = run("transform", tmp_path / "apart", "--transform.steps", "0")["output_error"]
    two, four = (
        run("cross-layer", tmp_path / n, "--transform.steps", "0", "--transform.joint_layers", n)["output_error"]
        for n in ("2", "4")
    )
    assert four < 0.9 * two < 0.9 * 0.8 * apart


def test_heads_and_layers_can_be_chosen(tmp_path: Path) -> None:
    run(
        "cross-layer",
        tmp_path / "three",
        "--transform.steps",
        "0",
        "--transform.joint_layers",
        "3",
        "--transform.joint_heads",
        "1",
    )
    capsule = Capsule.from_pretrained(tmp_path / "three")
    assert [tuple(stack.transform.channels_in.shape[:3]) for stack in capsule.layers] == [(6, 2, 32), (2, 2, 32)]
    for stack in capsule.layers:
        back = torch.einsum("pswc,pswd->scd", stack.transform.channels_in, stack.transform.channels_out)
        chosen = torch.eye(back.shape[1]).expand_as(back)
        torch.testing.assert_close(
            back, chosen, atol=4e-3, rtol=0, msg=lambda m: f"the encoder is the decoder's inverse on what is coded: {m}"
        )


def test_fewer_channels_are_coded_where_maps_are_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--transform.steps", "0", "--transform.logit_batches", "1"]
    free, bound = (
        run("cross-layer", tmp_path / n, *options, "--transform.max-map-mib", n)["output_error"] for n in ("32", "0.03")
    )
    codecs = [Capsule.from_pretrained(tmp_path / n).layers[0].transform for n in ("32", "0.03")]
    assert codecs[1].channels_out.shape[3] < codecs[0].channels_out.shape[3]
    assert codecs[1].bfloat16().decoder_bytes() <= 0.03 * 2**20
    assert free < bound, "what is left out is missed"
    assert "--transform.max-map-mib 0.03 leaves" in capsys.readouterr().err, "bits, too"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--transform.max-map-mib", "0.0001"], "the maps of one coded channel of every source take"),
        (["--transform.max-map-mib", "-1"], "--transform.max-map-mib -1.0: 0 or more"),
        (["--transform.logit_batches", "-1"], "--transform.logit-batches -1: 0 or more"),
        (["--transform.query-bank", "100000"], "--transform.query-bank 100000: only [0-9]+ queries read the tiles"),
        (
            ["--transform.allocation", "pyramid", "--transform.logit_batches", "0"],
            "--transform.allocation is an option of the family transform, not of cross-layer",
        ),
        (
            ["--transform.key_bits", "1", "--transform.value_bits", "1"],
            "--transform.key-bits is an option of the family transform, not of cross-layer",
        ),
        (["--transform.joint_layers", "-1"], "--transform.joint-layers -1: 0 or more"),
        (["--moment_batches", "1", "--codec.tile", "196"], "too few for stable bases"),
        (["--compression", "4000"], "address and frame"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cross-layer", *QUICK, "--transform.steps", "1", "--output", str(tmp_path / "none"), *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "none").exists()

"""Training of a transform code: bases and widths in closed form, gradients through the quantiser, ranks that agree."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.builders import rand

from kvcapsule import Capsule
from kvcapsule.codec.bit_allocation import (
    DISTORTION,
    SCALE,
    allocate,
    cell_reach,
    cell_scale,
    cell_variance,
    distortion,
)
from kvcapsule.codec.transform import Transform
from kvcapsule.segments.packed_rows import read_rows
from kvcapsule.segments.segment import Segment
from kvcapsule.training.families.coding_source import CodingSource
from kvcapsule.training.families.straight_through import coded
from kvcapsule.training.frozen_forward import divergence
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.training.losses import full_output, output_error
from kvcapsule.training.main import main
from kvcapsule.training.second_moments import CoefficientMoments, Extremes, Moments

QUICK = [
    "--data.size",
    "80",
    "--held_out",
    "16",
    "--batch",
    "8",
    "--moment_batches",
    "8",
    "--codec.tile",
    "28",
    "--threads",
    "1",
]
QUICK += ["--transform.logit_batches", "2"]


def test_bases_are_the_principal_axes_of_all_tiles_however_they_were_streamed() -> None:
    tiles = rand(20, 2, 6, 5, seed=1).double() + 3
    moments = Moments(2, 6, 5)
    for part in tiles.split(7):
        moments.add(part)
    centred = tiles - tiles.mean(0)
    for head in range(2):
        by_token = centred[:, head].transpose(1, 2).reshape(-1, 6)
        by_channel = centred[:, head].reshape(-1, 5)
        for data, axes in ((by_token, moments.bases().tokens[head]), (by_channel, moments.bases().channels_in[head].T)):
            found = (data @ axes.T).square().sum(0)
            torch.testing.assert_close(found, torch.linalg.svdvals(data).square())


def test_under_a_metric_the_channels_are_its_principal_axes_and_can_be_taken_back() -> None:
    tiles, root = rand(30, 1, 4, 3, seed=2).double(), torch.diag(torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64))
    moments = Moments(1, 4, 3)
    moments.add(tiles)
    bases = moments.bases((root @ root)[None])
    weighted = ((tiles - tiles.mean(0))[:, 0] @ root).reshape(-1, 3)
    found = ((tiles - tiles.mean(0))[:, 0] @ bases.channels_in[0]).reshape(-1, 3)
    torch.testing.assert_close(found.square().sum(0), torch.linalg.svdvals(weighted).square())
    torch.testing.assert_close(
        bases.channels_in @ bases.channels_out.transpose(1, 2), torch.eye(3, dtype=torch.float64)[None]
    )


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8])
def test_the_tables_are_those_of_a_gaussian(width: int) -> None:
    """Step and distortion by numerical integration of the density over each code's interval."""
    x = torch.linspace(-9, 9, 400_001, dtype=torch.float64)
    density = (-x.square() / 2).exp()
    step = float(cell_scale(torch.tensor([width]), torch.ones(1, dtype=torch.float64), torch.ones(1)))

    def lost(step: float) -> float:
        codes = (x / step).floor().clamp(-(2 ** (width - 1)), 2 ** (width - 1) - 1) + 0.5
        return float(((x - codes * step).square() * density).sum() / density.sum())

    assert lost(step) == pytest.approx(DISTORTION[width], rel=0.01)
    assert lost(step) < min(lost(step * 1.1), lost(step / 1.1))


def test_bits_go_where_they_save_most() -> None:
    """Worked by hand: the first bit saves 0.6366 of a cell's cost, the second 0.2446, the third 0.0814."""
    costs = [torch.tensor([[[16.0, 4.0]]]), torch.tensor([[[1.0]]])]
    bought = [[int(w) for unit in allocate(costs, budget) for w in unit.flatten()] for budget in range(6)]
    assert bought == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [2, 1, 0], [3, 1, 0], [3, 2, 0]]


def test_a_budget_that_covers_everything_gives_every_cell_eight_bits() -> None:
    (widths,) = allocate([torch.rand(2, 3, 4) + 0.1], 8 * 24)
    assert bool((widths == 8).all())
    assert float(distortion(widths).max()) == DISTORTION[8]


def test_a_cells_variance_is_that_of_its_eight_rows_the_last_short() -> None:
    variance = torch.arange(20.0).view(1, 10, 2)
    assert cell_variance(variance).tolist() == [[[56.0, 64.0], [34.0, 36.0]]]


def test_reach_is_the_greatest_distance_from_the_mean_on_either_side() -> None:
    """Streamed in two parts; the first coefficient is farthest below its mean of 1, the second above its mean of -2."""
    extremes = Extremes(1, 1, 2)
    for part in ([[4.0, -5.0], [-6.0, 3.0]], [[5.0, -4.0]]):
        extremes.add(torch.tensor(part)[:, None, None])
    assert extremes.reach(torch.tensor([[[1.0, -2.0]]], dtype=torch.float64)).tolist() == [[[7.0, 5.0]]]


def test_a_cells_reach_is_that_of_its_farthest_row_the_last_short() -> None:
    assert cell_reach(torch.arange(20.0).view(1, 10, 2)).tolist() == [[[14.0, 15.0], [18.0, 19.0]]]


def test_only_cells_of_eight_bits_reach_what_was_seen() -> None:
    """102 x 1.25 = 127.5 steps lie on either side of the middle; a reach of 2.04 is covered by a Gaussian's step of
    0.0308 and more."""
    widths, reach = torch.tensor([1, 2, 3, 4, 8, 8]), torch.tensor([102.0, 102.0, 102.0, 102.0, 102.0, 2.04])
    steps = cell_scale(widths, torch.ones(6, dtype=torch.float64), reach)
    assert steps.tolist() == pytest.approx([SCALE[1], SCALE[2], SCALE[3], SCALE[4], 1.0, SCALE[8]])


def test_a_coefficient_far_out_survives_eight_bits() -> None:
    """Tiles of which one in 500 holds a coefficient of 12 to 13 standard deviations; new ones hold another such."""
    tiles = rand(1000, 1, 8, 1, seed=7).double()
    tiles[::500, 0, 3] = torch.tensor([[12.0], [13.0]], dtype=torch.float64)
    moments, coefficients, extremes = Moments(1, 8, 1), CoefficientMoments(1, 8, 1), Extremes(1, 8, 1)
    moments.add(tiles)
    bases = moments.bases()._replace(tokens=torch.eye(8, dtype=torch.float64)[None])
    for part in tiles.split(300):
        coefficients.add(bases.coefficients(part))
        extremes.add(bases.coefficients(part))
    transform = CodingSource(bases, coefficients, extremes).transform(torch.full((1, 1, 1), 8), heads=1, dim=1)
    new = rand(40, 1, 8, 1, seed=8)
    new[0, 0, 3] = 14.0

    @torch.no_grad()
    def lost() -> torch.Tensor:
        return (transform.encode(new).read(torch.float32) - transform.coefficients(new)).abs().flatten()

    assert float(lost().max()) < 0.1
    with torch.no_grad():
        transform.step.copy_(SCALE[8] * (coefficients.variance().sum(1, keepdim=True) / 8).sqrt())
    clipped = lost()
    assert float(clipped.max()) > 8 and float(clipped.sort().values[-2]) < 1


def test_straight_through_is_what_reading_the_codes_gives_and_moves_every_parameter() -> None:
    torch.manual_seed(0)
    transform = Transform(head_groups=2, heads=2, tile=12, dim=6, rows=8, channels=5)
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.normal_()
        transform.step.abs_().add_(0.1)
        transform.widths.copy_(torch.tensor([[0, 1, 2, 3, 8]]).expand(2, 1, 5))
    x = rand(3, 4, 12, 6, seed=3).float()
    rows = coded(transform, transform.coefficients(x))
    torch.testing.assert_close(rows, read_rows(transform.encode(x), torch.float32))
    rows.square().sum().backward()
    for name in ("tokens_in", "channels_in", "offset", "step"):
        gradient = getattr(transform, name).grad
        assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().sum()) > 0, name


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("transform") / "one"
    assert main(["transform", *QUICK, "--compression", "10", "--transform.steps", "3", "--output", str(output)]) == 0
    return output


def test_a_short_training_gives_a_capsule_of_the_bytes_asked_for(trained: Path) -> None:
    capsule = Capsule.from_pretrained(trained)
    assert capsule.config.family == "transform"
    # The frame and the owner of each tile are paid for out of the same bytes.
    paid = 16 / 10 - (8 + 4 * 32) * 8 / (28 * 2 * 32 * 2 * 4)
    assert capsule.config.codec.bits == pytest.approx(paid, rel=0.002)
    metrics = yaml.safe_load((trained / "metrics.json").read_text())["train"]
    assert metrics["output_error"] < 0.1 and metrics["kl"] < 0.1


ROUNDING = 2.0**-10
"""Of a number in the file's 16 bits, relative to the largest."""


def assert_alike(one: torch.Tensor, other: torch.Tensor, tolerance: float, name: str) -> None:
    """On average within the tolerance; a number that rounds the other way is off by a step of 16 bits."""
    apart, size = (one - other).abs(), float(other.abs().max())
    assert float(apart.mean()) <= tolerance * size, name
    assert float(apart.max()) <= max(tolerance, 2 * ROUNDING) * size, name


@pytest.mark.parametrize(
    ("family", "options", "tolerance", "span_tolerance"),
    [
        # test_several_processes.py holds each family to less, in double precision.
        pytest.param("transform", ["--transform.logit_batches", "0"], 1e-5, None, marks=pytest.mark.slow),
        pytest.param("cross-layer", ["--transform.logit_batches", "0"], 5e-3, 1e-4, marks=pytest.mark.slow),
        ("cross-layer", [], 2e-2, 1e-3),
    ],
    ids=["transform", "cross-layer", "cross-layer through the logits"],
)
def test_two_processes_solve_the_same_bases_as_one(
    family: str, options: list[str], tolerance: float, span_tolerance: float | None, tmp_path: Path
) -> None:
    """Through the installed command, as torch.distributed with gloo: every step's rows are shared out, sums are added
    up.

    What the logits feel goes through the model and back in fp32, in batches of another size. A stack has many axes of
    nearly equal weight, which rounding turns into each other by a thousandth; what they span it leaves.
    """
    arguments = ["train", family, *QUICK, "--compression", "20", "--transform.steps", "0", *options]
    found = []
    for extra in ([], ["--trainer.devices", "2", "--trainer.strategy", "ddp"]):
        output = tmp_path / f"ranks{len(found)}"
        command = [str(Path(sys.executable).with_name("kvcapsule")), *arguments, *extra, "--output", str(output)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        found.append(load_file(output / "model.safetensors"))
    one, two = found
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert_alike(two[name].double(), tensor.double(), tolerance, name)
    if span_tolerance is not None:
        span, other = (
            torch.einsum(
                "pswc,qsvc->pswqv", *(x[f"layers.0.transform.channels_{end}"].double() for end in ("in", "out"))
            )
            for x in found
        )
        assert_alike(other, span, span_tolerance, "what the channels span")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compression", "0.5"], "at least 1, how many times fewer bytes"),
        (["--compression", "0"], "at least 1, how many times fewer bytes"),
        (["--bits", "9"], "at most 8"),
        (["--compression", "4000"], "address and frame"),
        (["--moment_batches", "1", "--codec.tile", "196"], "too few for stable bases of 196 tokens"),
        (["--transform.joint_heads", "3"], "does not divide the model's 2 KV heads"),
        (["--transform.allocation", "best"], "neither output, pyramid nor uniform"),
        (["--transform.key_bits", "1"], "give both or neither"),
        (["--transform.allocation", "pyramid", "--transform.logit_batches", "5"], "shares the bits out by itself"),
        (
            ["--transform.allocation", "uniform", "--transform.key_bits", "1", "--transform.value_bits", "1"],
            "shares the bits out",
        ),
        (
            ["--transform.joint_layers", "2"],
            "--transform.joint-layers is an option of the family cross-layer, not of transform",
        ),
        (
            ["--family", "magic"],
            "no codec family 'magic'; there are identity, kvcapsule, transform, cross-layer, compact, coded-compact",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "none"
    assert main(["transform", *QUICK, "--transform.steps", "1", "--output", str(output), *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not output.exists()


def test_padding_that_sees_nothing_does_not_spoil_the_error() -> None:
    """A batch in which one row's image ends early: its first readers are padding of the other."""
    keys, query = rand(2, 2, 4, 6, seed=4).float(), rand(2, 4, 3, 6, seed=5).float()
    rest = Segment(keys[:, :, :2], keys[:, :, 2:], torch.arange(2))
    visible = torch.ones(2, 3, 2, dtype=torch.bool)
    visible[1, 0] = False
    reads = torch.tensor([[True, True, True], [False, True, True]])
    tiles = keys[:1]
    layer = LayerHarvest(tiles, tiles, torch.tensor([0]), None, query, reads, rest, visible, 0.4)
    true = Segment(tiles, tiles, layer.owner)
    assert float(output_error(layer, true, full_output(layer))) == 0
    moved = Segment(tiles, tiles + 1, layer.owner)
    assert 0 < float(output_error(layer, moved, full_output(layer))) < 10


def test_the_divergence_is_over_what_predicts_the_answers_tokens() -> None:
    """The last of 5 places predicts nothing; an answer of 2 tokens is predicted at places 2 and 3, one of 1 token at
    place 3."""
    true = rand(2, 5, 7, seed=6)
    answers = torch.tensor([2, 1])
    for row, place, counts in (
        (0, 1, False),
        (0, 2, True),
        (0, 3, True),
        (0, 4, False),
        (1, 2, False),
        (1, 3, True),
        (1, 4, False),
    ):
        moved = true.clone()
        moved[row, place, 0] += 2
        p, q = true[row, place].softmax(-1), moved[row, place].softmax(-1)
        expected = float((p * (p / q).log()).sum()) / 3 if counts else 0.0
        assert float(divergence(true, moved, answers)) == pytest.approx(expected, abs=1e-6), (row, place)

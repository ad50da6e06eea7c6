"""TurboQuant: codes by hand, the distortion of its paper, products right on average, and bytes."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import GEOMETRY, rand
from support.prefills import tokens

from kvcapsule.errors import GeometryError
from kvcapsule.kernels.reference import attend, segment_scores
from kvcapsule.policy import Full, TurboQuant
from kvcapsule.policy.turboquant import rotation_of
from kvcapsule.segments.codebook_rows import CodebookRows, gaussian_levels
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.segments.sketched_rows import SketchedRows
from kvcapsule.vlm.geometry import KVGeometry

CPU = torch.device("cpu")
ROW = torch.tensor([[[[3.0, -4.0, 12.0, -84.0]]]])
"""85 long."""


def test_levels_are_those_of_the_tables() -> None:
    """Max's of 1960, to five digits."""
    positive = {b: [round(x, 4) for x in gaussian_levels(b)[2 ** (b - 1) :]] for b in (1, 2, 3)}
    assert positive == {1: [0.7979], 2: [0.4528, 1.5104], 3: [0.2451, 0.7560, 1.3439, 2.1519]}
    assert [round(x, 4) for x in gaussian_levels(4)[8:]] == [
        *(0.1284, 0.3880, 0.6568, 0.9423),
        *(1.2562, 1.6180, 2.0690, 2.7326),
    ]
    for bits in (1, 2, 3, 4):
        assert gaussian_levels(bits) == pytest.approx([-x for x in reversed(gaussian_levels(bits))])


def test_codes_by_hand() -> None:
    """Four channels: levels are half as far from 0. -84 / 85 is beyond the midpoint of 0.2264 and 0.7552."""
    rows = CodebookRows.pack(ROW, 2)
    # Codes 2 1 2 0, the first in the lowest bits, in two bytes for eight channels.
    assert rows.codes.flatten().tolist() == [2 + 4 * 1 + 16 * 2, 0]
    assert rows.length.item() == 85 and rows.length.dtype == torch.float16
    inner, outer = 85 * 0.4527800 / 2, 85 * 1.5104176 / 2
    assert rows.read(torch.float64).flatten().tolist() == pytest.approx([inner, -inner, inner, -outer])
    kept = CodebookRows.pack(ROW, 2, keep_length=True).read(torch.float64)
    assert float(kept.norm()) == pytest.approx(85, rel=1e-3)
    torch.testing.assert_close(kept / kept.norm(), rows.read(torch.float64) / rows.read(torch.float64).norm())


def test_a_sketch_by_hand() -> None:
    """With the identity as sketch, a bit says on which side of the level a channel lies."""
    rows = SketchedRows.pack(ROW, 2, torch.eye(4))
    level = 85 * 0.7978846 / 2
    missed = [3 - level, level - 4, 12 - level, level - 84]
    length = math.sqrt(sum(x * x for x in missed))
    step = math.sqrt(math.pi / 2) / 4 * length
    assert rows.signs.flatten().tolist() == [0 + 2 * 1]
    assert rows.read(torch.float64).flatten().tolist() == pytest.approx(
        [level, -level, level, -level, -step, step, -step, -step], rel=1e-3
    )


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_distortion_is_the_papers(bits: int, distortion: float) -> None:
    """Relative squared error of rows with an outlier channel, in the mean over rotations."""
    x = rand(1, 1, 200, 64, seed=1).float()
    x[..., 5] *= 8

    def error(turn: torch.Tensor) -> float:
        read = CodebookRows.pack(x @ turn, bits).read(torch.float32) @ turn.T
        return float((read - x).square().sum() / x.square().sum())

    errors = [error(rotation_of.__wrapped__(64, "random", seed, CPU)) for seed in range(30)]
    # The channels of a row of 64 are a little less spread than Gaussian numbers.
    assert sum(errors) / 30 == pytest.approx(distortion, rel=0.05)
    assert error(torch.eye(64)) > 2 * distortion, "without a rotation"
    # One Hadamard matrix makes all channels of such an outlier equally large.
    assert error(rotation_of(64, "hadamard", 0, CPU)) < 1.4 * distortion


def test_products_are_right_on_average() -> None:
    """Scores as attention reads them, of a query near the key, over rotations and sketches; without the sketch they are
    some 12 % too small at 2 bits, by the distortion."""
    of = tokens([(0, 0, 1)], [0], 1)
    query = of.keys + 0.3 * of.query[:, ::2]
    exact = (query * of.keys).sum(dim=3)
    means, errors = {}, {}
    for form in ("mse", "product"):
        estimates = []
        for seed in range(1500):
            (segment,) = TurboQuant(2, form=form, seed=seed).compress(of).visual
            scores = segment_scores(query[:, :, None], segment, 1.0)
            estimates.append((scores.flatten() / exact.flatten()).mean())
        ratios = torch.stack(estimates)
        means[form], errors[form] = float(ratios.mean()), float(ratios.std() / 1500**0.5)
    assert abs(means["product"] - 1) < 4 * errors["product"] < 0.1
    # Rows of 8 channels are less spread than a Gaussian.
    assert means["mse"] == pytest.approx(1 - 0.1, abs=0.03)
    assert errors["product"] > errors["mse"], "what vLLM leaves it out for"


@pytest.mark.parametrize("form", ["mse", "product"])
@pytest.mark.parametrize("rotation", ["random", "hadamard"])
def test_attention_reads_what_is_stored(form: str, rotation: str) -> None:
    """The maps of query and output undo the rotation: at 4 bits attention is near that over raw rows."""
    of = tokens([(0, 2, 60), (1, 9, 31)], [0, 4], 64)
    query = rand(2, 4, 3, 8, seed=7)
    policy = TurboQuant(4, form=form, rotation=rotation)
    ours, raw = (attend(query, [*c.visual, *c.text], of.scale) for c in (policy.compress(of), Full().compress(of)))
    assert 1e-4 < float((ours - raw).norm() / raw.norm()) < 0.2
    for segment in policy.compress(of).visual:
        plain = Segment(*segment.materialize(torch.float64), segment.owner, mask=segment.mask)
        torch.testing.assert_close(attend(query, [segment], 0.3), attend(query, [plain], 0.3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "bits", "keys", "values"),
    [("mse", 2, 4 + 2, 4 + 2), ("mse", 3, 6 + 2, 6 + 2), ("mse", 4, 8 + 2, 8 + 2), ("product", 3, 6 + 4, 6 + 2)],
)
def test_bytes_are_counted(form: str, bits: int, keys: int, values: int) -> None:
    """Of a head of 16 channels: bits, and a length of two bytes; a sketch has another. Maps are shared by all."""
    of = tokens([(0, 2, 60)], [0], 64)
    of = type(of)(**{**vars(of), "keys": rand(1, 2, 64, 16), "values": rand(1, 2, 64, 16)})
    (segment,) = TurboQuant(bits, form=form).compress(of).visual
    stored = {t.data_ptr(): t for t in segment.entry_tensors() if t is not segment.owner}
    assert storage_bytes(iter(stored.values())) == 60 * 2 * (keys + values)
    maps = 16 * 16 * 4 * (1 if form == "mse" else 3)
    # The rotation serves query and output; levels are shared, too, those of keys and of values.
    levels = 4 * 2**bits + (4 * 2 ** (bits - 1) if form == "product" else 0)
    assert storage_bytes(segment.parameter_tensors()) == maps + levels


def test_rotations_are_orthogonal_and_known_by_their_seed() -> None:
    for kind in ("random", "hadamard"):
        turn = rotation_of(24, kind, 5, CPU)
        torch.testing.assert_close(turn @ turn.T, torch.eye(24))
        assert torch.equal(turn, rotation_of.__wrapped__(24, kind, 5, CPU))
        assert not torch.equal(turn, rotation_of(24, kind, 6, CPU))


@pytest.mark.parametrize("pack", [lambda x: CodebookRows.pack(x, 3), lambda x: SketchedRows.pack(x, 3, torch.eye(8))])
def test_rows_are_chosen_and_built_again(pack: Callable[[torch.Tensor], Any]) -> None:
    x = rand(3, 2, 5, 8).float()
    rows = pack(x)
    chosen = rows.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.read(torch.float32), rows.read(torch.float32)[[2, 0]])
    assert chosen.shape == (2, *rows.shape[1:]) == chosen.read(torch.float32).shape
    again = rows.with_tensors(chosen.tensors())
    assert torch.equal(again.read(torch.float32), chosen.read(torch.float32))
    assert all(t.shape[0] == 3 for t in rows.tensors())
    assert torch.equal(rows.to("cpu").read(torch.float32), rows.read(torch.float32))


def test_a_row_of_zeros_is_read_as_zeros() -> None:
    for rows in (CodebookRows.pack(torch.zeros(1, 1, 2, 8), 2), CodebookRows.pack(torch.zeros(1, 1, 2, 8), 2, True)):
        assert torch.equal(rows.read(torch.float32), torch.zeros(1, 1, 2, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TurboQuant(8), "bits 8: TurboQuant has 2, 3 or 4."),
        (lambda: TurboQuant(form="dot"), "form 'dot' is neither 'mse' nor 'product'"),
        (lambda: TurboQuant(rotation="dct"), "rotation 'dct' is neither 'random' nor 'hadamard'"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_an_odd_head_has_no_hadamard_rotation() -> None:
    odd = KVGeometry("llava", 2, 4, 2, 9, "1d")
    TurboQuant(rotation="hadamard").require_geometry(GEOMETRY)
    TurboQuant().require_geometry(odd)
    with pytest.raises(GeometryError, match="head dim of 9"):
        TurboQuant(rotation="hadamard").require_geometry(odd)

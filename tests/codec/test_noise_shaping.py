"""Codes chosen together: whose errors fall on tokens that are little read."""

import dataclasses
from typing import Any

import pytest
import torch
from support.builders import (
    DIM,
    GEOMETRY,
    HEADS,
    TILE,
    cross_layer_capsule,
    prefill,
    rand,
    randomise,
    transform_capsule,
)
from support.encode_macs import encode_macs
from torch.utils.flop_counter import FlopCounterMode

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.coefficient_transform import CellTransform
from kvcapsule.codec.cross_layer import CrossLayerConfig
from kvcapsule.codec.noise_shaping import TokenWeighting, shaped, shaping_macs
from kvcapsule.codec.transform import Transform, TransformConfig
from kvcapsule.errors import CapsuleError
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.segments.bit_packing import GROUP
from kvcapsule.segments.coefficient_rows import CodedRows, Coding
from kvcapsule.training.families.straight_through import coded

FLOOR = 0.2


def coding(sets: int, groups: int, channels: int, width: int = 2, seed: int = 0) -> Coding:
    drawn = torch.Generator().manual_seed(seed)
    offset = 0.1 * torch.randn(sets, GROUP * groups, channels, generator=drawn, dtype=torch.float64)
    step = 0.5 + torch.rand(sets, groups, channels, generator=drawn, dtype=torch.float64)
    return Coding(torch.full((sets, groups, channels), width, dtype=torch.uint8), step, offset)


def basis(sets: int, tokens: int, rows: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(rand(sets, tokens, tokens, seed=seed)).Q[:, :, :rows]


def loss(x: torch.Tensor, tokens: torch.Tensor, weights: torch.Tensor, code: Coding) -> torch.Tensor:
    """What reading rounded coefficients misses of x, token by token times its weight: [E, S]."""
    error = tokens @ (code.rounding(x[0].dtype)(x[1], slice(None)) - x[0])
    return (weights[..., None] * error.square()).sum((2, 3))


def test_groups_make_up_for_what_those_behind_them_lost() -> None:
    """By definition: what is rounded stays, and the groups before it are solved anew by least squares under the
    weights."""
    tokens, code = basis(2, 40, 32), coding(2, 4, 5)
    x, weights = (
        3 * rand(3, 2, 32, 5, seed=2),
        torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    )
    found = shaped(x, tokens, weights, code)
    expected = torch.empty_like(x)
    for entry in range(3):
        for own in range(2):
            root = ((weights[entry, own] + FLOOR) / (1 + FLOOR)).sqrt()[:, None]
            design, target, read = (
                root * tokens[own],
                root * (tokens[own] @ x[entry, own]),
                torch.zeros(32, 5, dtype=torch.float64),
            )
            for first in (24, 16, 8, 0):
                left = target - design[:, first + 8 :] @ read[first + 8 :]
                free = torch.linalg.lstsq(design[:, : first + 8], left).solution[first:]
                expected[entry, own, first : first + 8] = free
                read[first : first + 8] = code.rounding(free.dtype)(free.expand(1, 2, 8, 5), slice(first, first + 8))[
                    0, own
                ]
    # The ridge, a ten-thousandth, is all the difference, unless it carries a number over the edge between two codes.
    assert ((found - expected).abs() < 0.01).double().mean() > 0.99
    assert torch.equal(found[..., -8:, :].isfinite(), torch.ones(3, 2, 8, 5, dtype=torch.bool))


def test_uneven_weights_are_worth_a_good_part_of_the_error() -> None:
    tokens, code = basis(1, 64, 64), coding(1, 8, 20)
    x = 0.8 * rand(16, 1, 64, 20, seed=4)
    weights = (4 * rand(16, 1, 64, seed=5)).exp()
    weights = weights / weights.mean(-1, keepdim=True)
    nearest = loss((x, x), tokens, weights, code)
    together = loss((x, shaped(x, tokens, weights, code)), tokens, weights, code)
    assert bool((together < nearest).all()) and float(together.sum()) < 0.7 * float(nearest.sum())
    assert float(loss((x, shaped(x, tokens, weights, code)), tokens, torch.ones_like(weights), code).sum()) > float(
        loss((x, x), tokens, torch.ones_like(weights), code).sum()
    )


def test_equal_weights_and_orthonormal_tokens_round_each_by_itself() -> None:
    tokens, code = basis(2, 24, 24), coding(2, 3, 7)
    x = rand(4, 2, 24, 7, seed=6)
    assert torch.equal(code.codes(shaped(x, tokens, torch.ones(4, 2, 24), code)), code.codes(x))


@pytest.mark.parametrize("width", [0, 1, 8])
def test_what_is_rounded_is_what_is_read(width: int) -> None:
    code = coding(2, 3, 7, width)
    x = 4 * rand(4, 2, 24, 7, seed=7)
    read = CodedRows.encode(x, code).read(torch.float64)
    nearest = code.rounding(x.dtype)
    torch.testing.assert_close(nearest(x, slice(None)), read)
    torch.testing.assert_close(nearest(x[:, :, 8:16], slice(8, 16)), read[:, :, 8:16])


def test_rows_that_fill_up_the_last_group_do_no_harm() -> None:
    """20 tokens have 20 components; of 24 rows the last four are read by no token."""
    tokens, code = torch.cat([basis(1, 20, 20), torch.zeros(1, 20, 4)], dim=-1), coding(1, 3, 6)
    x = torch.cat([rand(5, 1, 20, 6, seed=8), torch.zeros(5, 1, 4, 6)], dim=2)
    weights = torch.rand(5, 1, 20, generator=torch.Generator().manual_seed(9))
    for dtype in (torch.float32, torch.float64):
        moved = shaped(x.to(dtype), tokens, weights, code)
        assert moved.dtype == dtype and bool(moved.isfinite().all())
    assert float(loss((x, moved), tokens, weights, code).sum()) <= float(loss((x, x), tokens, weights, code).sum())


def test_weights_are_squares_of_the_attention_by_hand() -> None:
    """Two heads of one channel in one set, two queries each: attention (1/2, 1/2) and (1/4, 3/4), then (0, 1) twice."""
    weighting = TokenWeighting((2, 2, 2, 1), heads=2).double()
    weighting.queries[1] = torch.tensor([[[0.0], [torch.tensor(3.0).log()]], [[50.0], [60.0]]])
    weights = weighting(torch.tensor([[[[0.0], [1.0]], [[0.0], [1.0]]]], dtype=torch.float64), 1)
    square = torch.tensor([1 / 4 + 1 / 16, 1 / 4 + 9 / 16 + 2]) / 4
    torch.testing.assert_close(weights, (square / square.mean())[None, None].double())
    assert torch.equal(weighting(rand(3, 2, 9, 1), 0), torch.ones(3, 1, 9, dtype=torch.float64)), (
        "no queries: all alike"
    )


def with_query_bank(capsule: Capsule) -> Capsule:
    for i, weighting in enumerate(m for m in capsule.modules() if isinstance(m, TokenWeighting)):
        weighting.queries.copy_(2 * rand(*weighting.queries.shape, seed=i))
    return capsule


def compressed(capsule: Capsule, of: list[LayerPrefill]) -> list[torch.Tensor]:
    """The bytes that each layer reads, of the keys and of the values."""
    run = capsule.begin_pass([p.layer for p in of])
    segments = [done.visual[0] for p in of for _, done in run.add(p)]
    return [rows.packed for s in segments for rows in (s.keys, s.values) if isinstance(rows, CodedRows)]


def two_groups(**options: Any) -> Capsule:
    """A code of one group of rows has no group before it to make up for anything."""
    return transform_capsule(keys=(16, 6), values=(16, 5), **options)


CAPSULES = {"transform": two_groups, "cross-layer": cross_layer_capsule}


@pytest.mark.parametrize("family", CAPSULES)
def test_readers_change_the_codes_and_not_the_bytes(family: str) -> None:
    of = [dataclasses.replace(prefill(layer), layer=layer) for layer in range(GEOMETRY.layers)]
    plain, shaping = (
        compressed(with_query_bank(CAPSULES[family](joint_heads=2, readers=count)), of) for count in (0, 6)
    )
    for before, after in zip(plain, shaping, strict=True):
        assert before.shape == after.shape and not torch.equal(before, after)


@pytest.mark.parametrize("family", CAPSULES)
def test_a_tile_has_the_same_codes_alone_and_among_others(family: str) -> None:
    capsule = with_query_bank(CAPSULES[family](readers=6))
    of = [prefill(layer) for layer in range(GEOMETRY.layers)]
    alone = [dataclasses.replace(p, spans=p.spans[1:], shared={}) for p in of]
    for whole, one in zip(compressed(capsule, of), compressed(capsule, alone), strict=True):
        assert torch.equal(whole[-1:], one)


def test_the_straight_through_estimator_sees_the_codes_that_are_stored() -> None:
    transform = Transform(head_groups=2, heads=2, tile=16, dim=6, rows=16, channels=5)
    randomise(transform, torch.Generator().manual_seed(0))
    x, weights = rand(3, 4, 16, 6, seed=3).float(), torch.rand(3, 2, 16, generator=torch.Generator().manual_seed(1))
    rows = coded(transform, transform.coefficients(x), weights)
    torch.testing.assert_close(rows[:, ::2], transform.encode(x, weights).read(torch.float32))
    assert not torch.equal(rows, coded(transform, transform.coefficients(x)))
    rows.square().sum().backward()
    for name in ("tokens_in", "channels_in", "offset", "step"):
        assert float(getattr(transform, name).grad.abs().sum()) > 0, name


@pytest.mark.parametrize("gone", [None, 1], ids=["all layers", "a layer missing"])
def test_a_stack_weighs_tokens_by_the_mean_over_its_layers_readers(gone: int | None) -> None:
    """As training sees it: each layer's own queries on its own keys, the mean over those that are there."""
    capsule = with_query_bank(cross_layer_capsule(dataclasses.replace(GEOMETRY, layers=4), joint_layers=4, readers=6))
    codec, places = capsule.layers[0], [place for place in range(4) if place != gone]
    tiles = {
        place: (rand(2, HEADS, TILE, DIM, seed=place).float(), rand(2, HEADS, TILE, DIM, seed=9 + place).float())
        for place in places
    }
    run = codec.start()
    for place, (keys, values) in tiles.items():
        run.add(place, keys, values)
    stored = run.finish(places)[0].keys.keys
    sums = torch.stack([codec.transform.across(place, *tile) for place, tile in tiles.items()]).sum(0)
    weights = torch.stack([codec.readers(keys, place) for place, (keys, _) in tiles.items()]).mean(0)
    expected = coded(codec.transform, codec.transform.coefficients(sums), weights)
    assert isinstance(stored, CodedRows)
    torch.testing.assert_close(stored.read(torch.float32), expected)
    assert not torch.allclose(weights, codec.readers(tiles[0][0], 0), atol=0.05), "layers weigh unlike"
    assert float(weights.mean()) == pytest.approx(1.0)


def test_factors_are_never_taken_in_half_precision() -> None:
    """Under autocast, too, where products are."""
    tokens, code = basis(2, 24, 24).float(), coding(2, 3, 7)
    x, weights = rand(4, 2, 24, 7, seed=6), torch.rand(4, 2, 24, generator=torch.Generator().manual_seed(2))
    plain = shaped(x.bfloat16(), tokens, weights, code)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shaped(x.bfloat16(), tokens, weights, code), plain)
    assert plain.dtype == torch.float32


@pytest.mark.parametrize("family", CAPSULES)
def test_readers_are_saved_and_loaded(family: str, tmp_path: object) -> None:
    capsule = with_query_bank(CAPSULES[family](readers=6))
    capsule.save_pretrained(f"{tmp_path}/capsule")
    again = Capsule.from_pretrained(f"{tmp_path}/capsule")
    assert again.config.codec == capsule.config.codec
    of = [prefill(layer) for layer in range(GEOMETRY.layers)]
    for before, after in zip(compressed(capsule, of), compressed(again, of), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", [TransformConfig, CrossLayerConfig])
def test_no_fewer_readers_than_none(kind: type) -> None:
    with pytest.raises(ValueError, match="readers -1: queries of each KV head, 0 or more"):
        kind(TILE, readers=-1)
    for count in (2.5, True, float("nan")):
        with pytest.raises(ValueError, match=f"readers is {count}; it must be a whole number"):
            kind(TILE, readers=count)
    values = CapsuleConfig("transform", TransformConfig(TILE), GEOMETRY, "tiny").to_dict()
    values["codec"]["readers"] = "many"
    with pytest.raises(CapsuleError, match="cannot be used"):
        CapsuleConfig.from_dict(values)


def test_shapes_of_readers() -> None:
    assert TokenWeighting((3, HEADS, 5, DIM), HEADS)(rand(7, HEADS, 9, DIM), 2).shape == (7, 1, 9)
    assert TokenWeighting((1, HEADS, 5, DIM), 1)(rand(7, HEADS, 9, DIM)).shape == (7, HEADS, 9)


def test_shaping_costs_the_multiply_adds_that_it_says() -> None:
    """Counted by PyTorch, which does not count a factorisation; on whole codecs, where the two families share it."""
    tokens, code = basis(2, 30, 24).float(), coding(2, 3, 7)
    weights = torch.rand(5, 2, 30)
    with FlopCounterMode(display=False) as counter:
        shaped(rand(5, 2, 24, 7).float(), tokens, weights, code)
    products, _ = shaping_macs(30, 24, 7)
    assert counter.get_total_flops() == 2 * 5 * 2 * products
    for family, parts in (("transform", 2 * GEOMETRY.layers), ("cross-layer", GEOMETRY.layers // 2)):
        capsule = with_query_bank(CAPSULES[family](readers=6))
        plain = dataclasses.replace(capsule.config.codec, readers=0)
        reading = GEOMETRY.layers * HEADS * 6 * TILE * DIM
        added = encode_macs(capsule.config.codec, GEOMETRY) - encode_macs(plain, GEOMETRY) - reading
        sizes = _sizes(capsule)
        assert len(sizes) == parts and added == HEADS * sum(sum(shaping_macs(TILE, r, c)) for r, c in sizes)


def _sizes(capsule: Capsule) -> list[tuple[int, int]]:
    codes = [m for m in capsule.modules() if isinstance(m, CellTransform)]
    return [(m.tokens_out.shape[2], m.channels_out.shape[-1]) for m in codes]

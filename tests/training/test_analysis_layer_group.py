"""The study of stacks of layers: what one code for all of a stack saves, against what it must be on data made for
it."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.builders import HEADS, prefill, rand
from support.moments import moments_of, variances_of
from support.run_vlm import tiny_gemma

from kvcapsule.codec.bit_allocation import bits_for, water_fill
from kvcapsule.codec.coefficient_transform import merge_heads
from kvcapsule.codec.grouping import joint_heads, joint_layers, layer_groups
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.training.analysis.distortion import BITS
from kvcapsule.training.analysis.layer import LayerStudy
from kvcapsule.training.analysis.layer_group import LayerGroupStudy, layer_groups_of
from kvcapsule.training.analysis.passes import Observer
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.vlm.spans import VisualSpan

TILE, DIM = 5, 4
Layer = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer's tiles, [E, H, T, D] each."""


def drawn(tiles: int = 60, seed: int = 0) -> Layer:
    """Tokens and channels that go together, about a mean."""
    mixed = [rand(tiles, HEADS, TILE, DIM, seed=seed + i) @ rand(DIM, DIM, seed=seed + i + 50) for i in (1, 2)]
    keys, values = (rand(TILE, TILE, seed=seed + i + 90) @ x + 3 for i, x in enumerate(mixed))
    return keys, values


def prefill_of(layer: int, of: Layer) -> LayerPrefill:
    """A batch whose rows are a tile each, and one token of text."""
    keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in of)
    rows, _, tokens, _ = keys.shape
    spans = [VisualSpan(row, 0, tokens - 1, (1, 1, tokens - 1)) for row in range(rows)]
    return LayerPrefill(
        layer=layer,
        query=keys,
        keys=keys,
        values=values,
        spans=spans,
        valid=torch.ones(rows, tokens, dtype=torch.bool),
        scale=1.0,
        position_embeddings=None,
    )


def studied(batches: Sequence[Sequence[LayerPrefill]], heads: int, tile: int = TILE) -> LayerGroupStudy:
    """The stack of all layers; a batch is one prefill of each."""
    studies = [LayerStudy(of) for of in batches[0]]
    group = LayerGroupStudy([of.layer for of in batches[0]], heads)

    def first(of: LayerPrefill, tiles: LayerHarvest | None) -> None:
        studies[of.layer].first(of, tiles, [range(0)] * len(of.valid))
        group.first(tiles)

    def second(of: LayerPrefill, tiles: LayerHarvest | None) -> None:
        studies[of.layer].second(of, tiles)
        group.second(tiles)

    for visit in (first, second):
        for batch in batches:
            for of in batch:
                Observer(tile, True, visit).compress(of)
        if visit is first:
            group.solve(studies)
    return group


def found_in(layers: Sequence[Layer], heads: int = HEADS) -> list[dict[str, Any]]:
    return studied([[prefill_of(i, of) for i, of in enumerate(layers)]], heads).predicted()


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]], rel: float = 1e-9) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=rel)


def assert_whole(found: list[dict[str, Any]], layers: Sequence[Layer], heads: int) -> None:
    """What is found is what all tiles, lying side by side in memory, come to."""
    units = [merge_heads(x, heads) for of in layers for x in of]
    units = [x / moments_of(x).variance() ** 0.5 for x in units]
    unbiased = len(units[0]) / (len(units[0]) - 1)
    apart, together = (
        torch.cat([variances_of(x).flatten() for x in units]) * unbiased,
        variances_of(torch.cat(units, 3)) * unbiased,
    )
    assert [entry["bits"] for entry in found] == list(BITS)
    for entry in found:
        assert (entry["first"], entry["last"]) == (0, len(layers) - 1)
        for name, variances in (("apart", apart), ("together", together)):
            assert entry[name] == pytest.approx(water_fill(variances, entry["bits"]).distortion / len(units))
        assert water_fill(apart, entry["apart_bits"]).distortion / len(units) == pytest.approx(entry["together"])


@pytest.mark.parametrize("bits", BITS)
def test_bits_are_those_of_water_filling(bits: float) -> None:
    variances = rand(3, 50).exp() * (torch.arange(50) % 7 > 0)
    assert bits_for(variances, water_fill(variances, bits).distortion) == pytest.approx(bits)


def test_bits_by_hand() -> None:
    # 64 and 4 down to 2, 2.5 and 0.5 bits, a mean of 1 over three; the third keeps its 1.
    assert bits_for(torch.tensor([4.0, 64.0, 1.0]), 5.0) == pytest.approx(1)
    assert bits_for(torch.tensor([4.0, 64.0, 1.0]), 69.0) == bits_for(torch.zeros(3), 0.0) == 0
    assert bits_for(torch.tensor([4.0, 64.0, 1.0]), 0.0) == math.inf


@pytest.mark.parametrize("heads", [1, 2])
def test_stack_is_that_of_all_tiles_at_once(heads: int) -> None:
    layers = [drawn(seed=1), drawn(seed=2), drawn(seed=3)]
    assert_whole(found_in(layers, heads), layers, heads)


@pytest.mark.parametrize("heads", [1, 2])
def test_stack_batches_of_several_images_in_their_frames(heads: int) -> None:
    """Spans of 24 and 10 tokens in tiles of 5; then of 7 alone, and one that fills no tile."""
    kinds = ({}, {"spans": ((0, 3, 24), (0, 28, 2), (1, 9, 7))}, {"spans": ((1, 2, 4),)}, {})
    batches = []
    for number, kind in enumerate(kinds):
        batch = []
        for layer in range(2):
            of = prefill(layer, **kind)
            keys, values = (x + rand(*x.shape, seed=10 * number + layer) for x in (of.keys, of.values.roll(layer, 1)))
            batch.append(
                LayerPrefill(
                    layer=layer,
                    query=of.query,
                    keys=keys,
                    values=values,
                    spans=of.spans,
                    valid=of.valid,
                    scale=of.scale,
                    position_embeddings=of.position_embeddings,
                )
            )
        batches.append(batch)
    tiles: list[list[LayerHarvest]] = [[], []]
    for batch in batches:
        for of in batch:
            Observer(5, True, lambda of, cut: tiles[of.layer].append(cut) if cut is not None else None).compress(of)
    assert [len(cut.keys) for cut in tiles[0]] == [6, 5, 6] and tiles[0][0].frame is not None
    layers = [(torch.cat([cut.keys for cut in own]), torch.cat([cut.values for cut in own])) for own in tiles]
    assert_whole(studied(batches, heads, 5).predicted(), layers, heads)


@pytest.mark.parametrize("heads", [1, 2])
def test_stack_copies_cost_what_one_costs(heads: int) -> None:
    """Six units that are one: all the bits go to it."""
    keys, _ = drawn()
    copies = [(keys, 3 * keys + 1), (0.1 * keys, -keys), (keys - 7, 20 * keys)]
    for entry in found_in(copies, heads):
        assert entry["apart_bits"] == pytest.approx(6 * entry["bits"], rel=1e-6)


def test_stack_what_does_not_vary_is_never_coded() -> None:
    """A constant that is no binary fraction leaves a variance of rounding errors, which must not be scaled to 1."""
    keys, _ = drawn()
    still = torch.full_like(keys, 7.7)
    found = found_in([(keys, still), (keys, still)])
    for entry, alone in zip(found, found_in([(keys, still)]), strict=True):
        assert entry["apart_bits"] == pytest.approx(2 * entry["bits"], rel=1e-6)
        assert entry["apart"] == pytest.approx(alone["apart"]) and alone["together"] == pytest.approx(alone["apart"])


def test_stack_nothing_varies() -> None:
    zeros = torch.zeros(20, HEADS, TILE, DIM)
    for entry in found_in([(zeros, zeros)]):
        assert (entry["apart"], entry["together"], entry["apart_bits"]) == (0, 0, 0)


def test_stack_independent_layers_save_nothing() -> None:
    noise = [(rand(1500, HEADS, TILE, DIM, seed=i), rand(1500, HEADS, TILE, DIM, seed=i + 9)) for i in range(2)]
    for entry in found_in(noise):
        assert entry["apart_bits"] == pytest.approx(entry["bits"], rel=0.03)


def test_stack_what_layers_share_is_stored_once() -> None:
    """Layers of one half that is common and one of their own: together never costs more, and saves less than copies
    would."""
    common, _ = drawn(400)
    layers = [(common + drawn(400, seed=i)[0], common + drawn(400, seed=i + 20)[0]) for i in (3, 5)]
    for entry in found_in(layers):
        assert entry["together"] < entry["apart"] and 1.05 * entry["bits"] < entry["apart_bits"] < 3 * entry["bits"]


@pytest.mark.parametrize("heads", [1, 2])
def test_stack_order_scale_and_means_do_not_matter(heads: int) -> None:
    layers = [drawn(seed=1), drawn(seed=4), drawn(seed=7)]
    expected = found_in(layers, heads)
    assert_alike(found_in(layers[::-1], heads), expected)
    assert_alike(found_in([(100 * keys, values - 9) for keys, values in layers], heads), expected, rel=1e-7)


def test_stack_holds_tiles_until_its_last_layer() -> None:
    layers = [prefill_of(i, drawn(8)) for i in range(2)]
    group, held = LayerGroupStudy([0, 1], 1), []
    for of in layers * 2:
        Observer(TILE, True, lambda _, tiles: group.first(tiles)).compress(of)
        held.append(len(group.pending))
    assert held == [2, 0, 2, 0]


def test_stacks_are_those_of_the_model(model) -> None:
    assert [(group.layers, group.heads) for group in layer_groups_of(model)] == [([0, 1, 2, 3], 2)]
    windowed, _ = tiny_gemma()
    assert [group.layers for group in layer_groups_of(windowed)] == [[1, 3]]


@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "heads", "layers"),
    [(32, 128, 1, 2), (8, 64, 2, 2), (3, 64, 1, 4), (4, 32, 4, 2), (1, 256, 1, 1), (2, 512, 1, 1)],
)
def test_stacks_hold_so_many_channels(kv_heads: int, head_dim: int, heads: int, layers: int) -> None:
    assert (joint_heads(kv_heads, head_dim), joint_layers(heads, head_dim)) == (heads, layers)


def test_stacks_cover_all_layers() -> None:
    assert layer_groups(5, 2) == [range(0, 2), range(2, 4), range(4, 5)]
    assert layer_groups(3, 4) == [range(3)]

"""Tiles that begin at blocks of the sequence: where they are, whatever stands before an image, and what reads them."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.builders import GEOMETRY, prefill, transform_capsule
from support.prefills import alone, tokens
from support.run_vlm import assert_same, longer, run, step
from support.run_vlm import prefill as first_forward
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.masks import tokens_before
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.methods.tiles import cut_tiles, tile_starts, tiled
from kvcapsule.policy import Full
from kvcapsule.vlm.geometry import KVGeometry

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration


@pytest.mark.parametrize(
    ("start", "length", "tile", "align", "expected"),
    [
        (1, 196, 160, 32, [32]),
        (1, 196, 64, 32, [32, 96]),
        (1, 196, 32, 32, [32, 64, 96, 128, 160]),
        (0, 196, 64, 32, [0, 64, 128]),
        (32, 64, 64, 32, [32]),
        (33, 95, 64, 32, [64]),
        (33, 94, 64, 32, []),
        (1, 62, 32, 32, []),
        (1, 30, 32, 32, []),
        (5, 196, 64, 1, [5, 69, 133]),
        (5, 63, 64, 1, []),
    ],
)
def test_where_tiles_begin(start: int, length: int, tile: int, align: int, expected: list[int]) -> None:
    """At the first whole block, and no tile leaves the span."""
    assert list(tile_starts(start, length, tile, align)) == expected


def marked(of: LayerPrefill, tile: int, align: int) -> list[list[int]]:
    """The tokens in tiles, counted within each row's own tokens."""
    inside = tiled(of, tile, align)
    return [inside[row][of.valid[row]].nonzero()[:, 0].tolist() for row in range(len(inside))]


def test_padding_does_not_count_and_what_the_cache_holds_does() -> None:
    """Tokens 2 to 21 of a row are its image: blocks of four begin at 4; with one token before, at 3 of the row's own,
    and with five before at the same."""
    for padding in ([0, 3, 9], [9, 0, 1]):
        of = tokens([(row, pad + 2, 20) for row, pad in enumerate(padding)], padding, 40)
        assert marked(of, 8, 4) == [list(range(4, 20))] * 3
        later = replace(of, before=(0, 1, 5), shared={})
        assert marked(later, 8, 4) == [list(range(4, 20)), list(range(3, 19)), list(range(3, 19))]
        assert marked(replace(of, shared={}), 8, 1) == [list(range(2, 18))] * 3


def test_tiles_hold_the_tokens_that_are_marked() -> None:
    of = tokens([(0, 12, 21), (1, 2, 9), (1, 14, 17)], [7, 0], 40)
    tiles = cut_tiles(of, 8, align=4)
    assert tiles is not None
    # The places in the batch: 7 tokens of padding in row 0, so its blocks begin at 11, 15 and so on.
    starts = [(0, 15), (0, 23), (1, 16)]
    assert tiles.owner.tolist() == [row for row, _ in starts]
    for tile, (row, start) in enumerate(starts):
        torch.testing.assert_close(tiles.keys[tile], of.keys[row, :, start : start + 8], rtol=0, atol=0)
        torch.testing.assert_close(tiles.values[tile], of.values[row, :, start : start + 8], rtol=0, atol=0)
    assert tiled(of, 8, 4).sum() == 24
    assert cut_tiles(of, 24, align=4) is None and not tiled(of, 24, 4).any()


@pytest.mark.parametrize("padding", [(0, 0), (5, 2)])
def test_a_batch_is_compressed_as_its_rows_are(padding: tuple[int, int]) -> None:
    """What stands left of a row moves no tile, and what is in none is exact."""
    capsule = transform_capsule(tile=10, align=5).double()
    of = prefill(spans=((0, 7, 19), (1, 9, 18)))
    valid = torch.arange(30) >= torch.tensor(padding)[:, None]
    of = replace(of, valid=valid)
    query = of.query[:, :, -2:]
    together = capsule.compress(of)
    assert isinstance(together, Compressed)
    read = attend(query, [*together.visual, *together.text], of.scale)
    for row in range(2):
        begin = padding[row]
        rotation = of.position_embeddings
        assert rotation is not None
        single = replace(alone(of, row), position_embeddings=(rotation[0][:, begin:], rotation[1][:, begin:]))
        one = capsule.compress(single)
        torch.testing.assert_close(
            read[row : row + 1], attend(query[row : row + 1], [*one.visual, *one.text], of.scale)
        )
    full = Full().compress(replace(of, shared={}))
    assert not torch.allclose(read, attend(query, [*full.visual, *full.text], of.scale))


@pytest.mark.parametrize("align", [1, 16, 98])
def test_nothing_is_lost_where_nothing_is_coded(
    model: Model, mixed: BatchFeature, greedy: Any, expected: Any, align: int
) -> None:
    """Also where images hold tiles in some rows alone."""
    geometry = KVGeometry.from_config(model.config)
    capsule = Capsule(CapsuleConfig("identity", IdentityConfig(tile=max(align, 48), align=align), geometry, "-"))
    assert_same(run(model, capsule, mixed, **greedy), expected)


class Positions(Method):
    """Records where spans begin in their rows' sequences, and stores everything."""

    def __init__(self) -> None:
        self.seen: list[list[tuple[int, int]]] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        if prefill.layer == 0:
            self.seen.append([(span.row, prefill.position(span)) for span in prefill.spans])
        return Full().compress(prefill)


def test_positions_go_on_in_later_turns(model: Model, make_batch: Batch) -> None:
    """By direct forwards with padding in each: an image's position counts its row's own tokens and no others."""
    batches = [
        make_batch((1, "Read line 2."), (1, "What is the number beside the owl?")),
        make_batch((1, "And in this one?"), (1, "Hello.")),
    ]
    image = model.config.image_token_id
    expected, past = [], torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        before = batch["attention_mask"].cumsum(1) - 1
        firsts = [int((batch["input_ids"][row] == image).nonzero()[0]) for row in range(2)]
        expected.append([(row, int(past[row] + before[row, first])) for row, first in enumerate(firsts)])
        past += batch["attention_mask"].sum(1) + 2
    method, mask = Positions(), torch.ones(2, 0, dtype=torch.int64)
    with attach(model):
        cache = CapsuleCache(model.config, method)
        for batch in batches:
            length = batch["input_ids"].shape[1]
            mask = torch.cat([mask, batch["attention_mask"]], dim=1)
            call = {**batch, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, -length:]}
            first_forward(model, BatchFeature(call), cache)
            mask = longer(mask, 2)
            step(model, cache, torch.tensor([[40, 41], [42, 43]]), mask)
    assert method.seen == expected
    assert len({place for _, place in expected[1]}) == 2


def test_tokens_before() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    four = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, None].expand(2, 1, 2, 5)
    for form in (mask, four, {"full_attention": mask}):
        assert tokens_before(form, 2, 2, 3) == [1, 3]
    assert tokens_before(mask[:1], 2, 2, 3) == [1, 1]
    # No mask, or one of the newest tokens alone: all that came before counts.
    assert tokens_before(None, 2, 2, 3) == tokens_before(mask[:, -2:], 2, 2, 3) == [3, 3]


@pytest.mark.parametrize(
    ("tile", "align", "message"),
    [
        (100, 32, r"tile 100 is no multiple of align 32.*choose a tile of 96\."),
        (16, 32, r"choose a tile of 32\."),
        (16, 0, "align 0 must be at least 1"),
    ],
)
def test_tiles_that_do_not_end_with_blocks_are_refused(tile: int, align: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IdentityConfig(tile=tile, align=align)


def test_saved_and_loaded(tmp_path: Any) -> None:
    capsule = Capsule(CapsuleConfig("identity", IdentityConfig(tile=64, align=32), GEOMETRY, "-"))
    capsule.save_pretrained(tmp_path / "c")
    assert Capsule.from_pretrained(tmp_path / "c").config.codec.align == 32
    assert (
        "in tiles of 64 that begin at multiples of 32 tokens of the sequence" in (tmp_path / "c/README.md").read_text()
    )

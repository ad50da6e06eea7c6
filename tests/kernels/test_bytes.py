"""Decoding reads what is stored and never builds the full visual keys or values: every tensor that a step makes is
looked at."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.op_recorder import Witness
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference import cache as cache_module
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels import reference
from kvcapsule.segments.segment import Segment

VISUAL, TILE, STORED = 196, 49, 13
"""Visual tokens of an image; tokens of a tile; rows of it that a retention ratio of 0.25 stores."""
HEADS, GROUP, DIM, LAYERS = 2, 2, 32, 4
TILES = 3 * VISUAL // TILE
"""The batch holds three images."""


def written_out(made: list[tuple[str, torch.Size]]) -> list[tuple[str, torch.Size]]:
    """Tensors as large as the keys (or values) of all visual tokens of a layer, or as those of a tile with more rows
    than are stored."""
    whole = TILES * TILE * HEADS * DIM

    def expands(shape: torch.Size) -> bool:
        rows_of_channels = len(shape) >= 3 and shape[-1] == DIM and shape[-2] in (TILE, VISUAL, TILE * TILES)
        channels_of_rows = len(shape) >= 3 and shape[-2] == DIM and shape[-1] in (TILE, VISUAL, TILE * TILES)
        return rows_of_channels or channels_of_rows or shape.numel() >= whole

    return [(name, shape) for name, shape in made if expands(shape)]


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., BatchFeature]) -> BatchFeature:
    return make_batch((1, "Read line 2."), (2, "Transcribe the page."))


@contextmanager
def decoding(
    model: LlavaForConditionalGeneration, capsule: Capsule, batch: BatchFeature
) -> Iterator[tuple[CapsuleCache, Callable[[], Any]]]:
    """A cache after prefill and the call of one decode step on it."""
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.int64)], dim=1)
    positions = mask.sum(dim=1, keepdim=True) - 1
    with attach(model), torch.no_grad():
        cache = CapsuleCache(model.config, capsule)
        model(**batch, **cache_argument(cache))
        token = torch.tensor([[40], [41]])
        yield (
            cache,
            lambda: model(input_ids=token, attention_mask=mask, position_ids=positions, **cache_argument(cache)),
        )


def watch_step(
    model: LlavaForConditionalGeneration, capsule: Capsule, batch: BatchFeature, monkeypatch: pytest.MonkeyPatch
) -> Witness:
    """What the attention of one decode step makes, over all layers."""
    witness = Witness()

    def attend(*args: Any) -> torch.Tensor:
        with witness:
            return reference.attend(*args)

    with decoding(model, capsule, batch) as (_, step):
        monkeypatch.setattr(cache_module, "attend", attend)
        step()
    assert len(witness.made) > LAYERS * 30
    return witness


def test_nothing_of_full_length_is_built(
    model: LlavaForConditionalGeneration,
    random_capsule: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    witness = watch_step(model, random_capsule(0.25, 0.25, TILE), batch, monkeypatch)
    assert written_out(witness.made) == []
    shapes = {shape for _, shape in witness.made}
    assert torch.Size((TILES, HEADS, GROUP, STORED)) in shapes, "scores of the stored rows"
    assert torch.Size((TILES, HEADS, GROUP, TILE)) in shapes, "scores of all tokens: one number a token and query"


@pytest.mark.parametrize("joint", [1, 2])
def test_codes_are_read_without_building_the_tile(
    joint: int,
    model: LlavaForConditionalGeneration,
    random_transform: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: Any,
) -> None:
    """The coefficients are built, 16 by 12 of the keys and 24 by 20 of the values, and no tile of 49 by 32."""
    witness = watch_step(model, random_transform(TILE, (16, 12), (24, 20), joint_heads=joint), batch, monkeypatch)
    assert written_out(witness.made) == []
    shapes = {shape for _, shape in witness.made}
    sets = HEADS // joint
    assert torch.Size((TILES, sets, 16, 12)) in shapes and torch.Size((TILES, sets, 24, 20)) in shapes
    assert torch.Size((TILES, HEADS, GROUP, TILE)) in shapes, "scores of all tokens: one number a token and query"


def test_maps_are_not_copied_for_every_tile(
    model: LlavaForConditionalGeneration,
    random_capsule: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A map of 196 x 79 is larger than the keys that it stands for: one for each image would be more than the full
    cache."""
    assert written_out(watch_step(model, random_capsule(0.4, 0.4, VISUAL), batch, monkeypatch).made) == []


def test_the_whole_step_builds_nothing_of_full_length(
    model: LlavaForConditionalGeneration, random_capsule: Callable[..., Capsule], batch: BatchFeature
) -> None:
    """Outside of attention too: masks and positions have the logical length, but no channels."""
    with decoding(model, random_capsule(0.25, 0.25, TILE), batch) as (_, step), Witness() as witness:
        step()
    assert (
        written_out([(name, shape) for name, shape in witness.made if shape.numel() < TILES * TILE * HEADS * DIM]) == []
    )


def test_attention_reads_all_that_is_stored_and_nothing_else(
    model: LlavaForConditionalGeneration,
    random_capsule: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bytes of the segments' storages are the bytes that operations are given."""
    witness = Witness()

    def attend(*args: Any) -> torch.Tensor:
        with witness:
            return reference.attend(*args)

    with decoding(model, random_capsule(0.25, 0.25, TILE), batch) as (cache, step):
        monkeypatch.setattr(cache_module, "attend", attend)
        step()
        segments = [s for layer in cache.layers for s in (*layer.visual, *layer.text)]
        # Where every row has an entry of its own, nobody need ask whose it is.
        known = {s.owner.data_ptr() for s in segments if s.each_row}
        stored = [t for s in segments for t in s.entry_tensors() if t.data_ptr() not in known]
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in stored}
        visual = {
            t.untyped_storage().data_ptr() for layer in cache.layers for s in layer.visual for t in s.entry_tensors()
        }
        keys_and_values = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for layer in cache.layers
            for s in layer.visual
            for t in (s.keys, s.values)
        }
        assert held.keys() <= witness.read.keys()
        assert sum(witness.read[pointer] for pointer in visual) == cache.bytes().visual
        assert sum(keys_and_values.values()) == LAYERS * TILES * HEADS * DIM * 4 * 2 * STORED
    full = LAYERS * 2 * 3 * VISUAL * HEADS * DIM * 4
    assert cache.bytes().visual < 0.29 * full


def test_the_check_sees_an_mlp(
    model: LlavaForConditionalGeneration,
    random_capsule: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The MLP key decoder expands the keys, and only them."""
    witness = watch_step(model, random_capsule(0.25, 0.25, TILE, key_decoder="mlp", hidden=8), batch, monkeypatch)
    found = {shape for _, shape in written_out(witness.made)}
    assert torch.Size((TILES, HEADS, TILE, DIM)) in found


def test_the_check_sees_materialize(
    model: LlavaForConditionalGeneration, random_capsule: Callable[..., Capsule], batch: BatchFeature
) -> None:
    with decoding(model, random_capsule(0.25, 0.25, TILE), batch) as (cache, _):
        segment: Segment = cache.layers[0].visual[0]
        with Witness() as witness:
            keys, values = segment.materialize()
    assert keys.shape == values.shape == (TILES, HEADS, TILE, DIM)
    assert len(written_out(witness.made)) >= 2


def test_the_check_sees_raw_rows(
    model: LlavaForConditionalGeneration,
    identity: Callable[..., Capsule],
    batch: BatchFeature,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capsule that stores everything reads everything."""
    assert written_out(watch_step(model, identity(TILE), batch, monkeypatch).made)

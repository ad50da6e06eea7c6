"""Tiles are copies unless a codec borrows them: nothing that one layer stores is overwritten by the next."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from support.builders import (
    GEOMETRY,
    TILE,
    coded_compact_capsule,
    cross_layer_capsule,
    kv_capsule,
    prefill,
    transform_capsule,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import CodecConfig, KeyCodec, KeyPart, PairCodec, ValueCodec, ValuePart
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.geometry import KVGeometry


class ViewKeys(KeyCodec):
    """Stores what it is given, without a copy."""

    def encode(self, k_EHTD: torch.Tensor) -> KeyPart:
        return KeyPart(k_EHTD)


class ViewValues(ValueCodec):
    def encode(self, v_EHTD: torch.Tensor) -> ValuePart:
        return ValuePart(v_EHTD[:])


@dataclass(frozen=True)
class ViewConfig(CodecConfig):
    borrows: bool = False

    def build(self, geometry: KVGeometry, layer: int) -> PairCodec:
        keys, values = ViewKeys(), ViewValues()
        keys.borrows_tiles = values.borrows_tiles = self.borrows
        return PairCodec(keys, values)


def two_layers() -> list[LayerPrefill]:
    """Of one forward, with other numbers; images of two rows, so that their tiles are gathered in one place."""
    first = prefill(0)
    return [first, replace(first, layer=1, keys=3 - first.keys, values=2 * first.values, shared=first.shared)]


def overwrite_buffers(of: LayerPrefill) -> int:
    """Fill what the next layer's tiles are written to; returns how much there is of it."""
    buffers = [buffer for grid in of.shared.values() for buffer in getattr(grid, "buffers", {}).values()]
    for buffer in buffers:
        buffer.fill_(torch.nan)
    return len(buffers)


def read(segments: list[Segment]) -> list[torch.Tensor]:
    return [x.clone() for s in segments for x in s.materialize(torch.float64)]


def test_a_codec_that_stores_views_is_not_overwritten() -> None:
    capsule = Capsule(CapsuleConfig("view", ViewConfig(TILE), GEOMETRY, "tiny"))
    first, second = two_layers()
    stored = capsule.compress(first).visual
    before = read(stored)
    capsule.compress(second)
    overwrite_buffers(first)
    for now, then in zip(read(stored), before, strict=True):
        assert torch.equal(now, then) and bool(now.isfinite().all())


def test_a_codec_that_borrows_and_stores_views_is_refused() -> None:
    capsule = Capsule(CapsuleConfig("view", ViewConfig(TILE, borrows=True), GEOMETRY, "tiny"))
    with pytest.raises(RuntimeError, match=r"PairCodec borrows its tiles .* and encoded views of them"):
        capsule.compress(prefill())
    with pytest.raises(RuntimeError, match="views of them"):
        capsule.compress(prefill(spans=((0, 3, 24),), rotary=True))


def identity() -> Capsule:
    return Capsule(CapsuleConfig("identity", IdentityConfig(TILE), GEOMETRY, "tiny"))


def compact() -> Capsule:
    capsule = Capsule(CapsuleConfig("compact", CompactConfig(TILE, ratios=(0.4, 0.4), bank=24), GEOMETRY, "tiny"))
    for codec in capsule.layers:
        codec.bank.copy_(torch.randn(codec.bank.shape, generator=torch.Generator().manual_seed(0)))
    return capsule


SHIPPED: dict[str, Callable[[], Capsule]] = {
    "identity": identity,
    "kvcapsule": lambda: kv_capsule(GEOMETRY),
    "kvcapsule with mlp": lambda: kv_capsule(GEOMETRY, key_decoder="mlp", hidden=8),
    "kvcapsule in few bits": lambda: kv_capsule(GEOMETRY, latent_bits=4),
    "transform": transform_capsule,
    "cross-layer": cross_layer_capsule,
    "compact": compact,
    "coded-compact": lambda: coded_compact_capsule(GEOMETRY),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_codecs_borrow_and_store_copies(name: str) -> None:
    """What they store of tiles that are overwritten afterwards is what they store of copies."""
    stored = []
    for borrows in (True, False):
        capsule = SHIPPED[name]().double()
        assert all(codec.borrows_tiles for codec in capsule.layers)
        for codec in capsule.layers:
            codec.borrows_tiles = borrows
        layers, segments = two_layers(), []
        compression = capsule.begin_pass([0, 1])
        for of in layers:
            segments += [s for _, compressed in compression.add(of) for s in compressed.visual]
            assert (overwrite_buffers(of) == 2) == borrows
        stored.append(read(segments))
    assert len(stored[0]) == len(stored[1]) > 0
    for ours, theirs in zip(*stored, strict=True):
        assert torch.equal(ours, theirs)

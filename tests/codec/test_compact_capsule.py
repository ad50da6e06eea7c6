"""Compact capsules as files and families: bytes, saving, and what is refused."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, prefill, rand
from support.compact_layers import capsule

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import FAMILIES
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment, storage_bytes


def test_a_capsule_reads_as_its_layers_encode() -> None:
    """Tiles in their frames; what fills none is raw, and the segment holds keys, values and a bias, and no map."""
    built, of = capsule().double(), prefill(1)
    (segment, rest), text = built.compress(of)
    cos, sin = (x[:, [3, 13, 5]][0].chunk(2, dim=-1)[0] for x in of.position_embeddings)
    tiles = [(0, 3), (0, 13), (1, 5)]
    keys, values = (torch.stack([x[row][:, at : at + TILE] for row, at in tiles]) for x in (of.keys, of.values))
    frame = Frame(cos, sin)
    encoded = built.layers[1].encode(frame.unrotate(keys), values)
    query = rand(2, 4, 3, DIM, seed=7)
    expected = attend(query, [encoded.segment(torch.tensor([0, 0, 1]), frame), rest, *text], of.scale)
    torch.testing.assert_close(attend(query, [segment, rest, *text], of.scale), expected)
    assert segment.tokens == 4
    assert list(segment.parameter_tensors()) == []
    full = attend(query, [Segment(of.keys, of.values, torch.arange(2))], of.scale)
    assert not torch.allclose(expected, full, atol=1e-3)


def test_bytes_are_those_of_keys_values_and_bias() -> None:
    """Four of ten tokens of three tiles: rows of 2 x 8 numbers and a bias, the owners, and the frames' 2 x 4
    numbers."""
    of = prefill(1)
    of = replace(of, keys=of.keys.float(), values=of.values.float())
    (segment, _), _ = capsule(0.4).compress(of)
    frames = storage_bytes(iter(segment.frame.tensors()))
    assert storage_bytes(segment.entry_tensors()) == 3 * HEADS * 4 * (2 * DIM + 1) * 4 + 3 * 8 + frames
    (packed, _), _ = capsule(0.4, latent_bits=4).compress(of)
    codes, ranges, bias = 3 * HEADS * 2 * DIM * 4, 3 * HEADS * 2 * DIM * 2 * 4, 3 * HEADS * 4 * 4
    assert storage_bytes(packed.entry_tensors()) == codes + ranges + bias + 3 * 8 + frames


@pytest.mark.parametrize(
    "options", [{}, {"selector": "learned", "hidden": 5, "passes": 1}, {"latent_bits": 8}], ids=str
)
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    built, of = capsule(**options), prefill()
    of = replace(of, keys=of.keys.float(), values=of.values.float(), query=of.query.float())
    built.save_pretrained(tmp_path / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "capsule")
    assert loaded.config == built.config
    assert loaded.state_dict().keys() == built.state_dict().keys()
    query = rand(2, 4, 3, DIM, seed=7).float()
    outputs = [attend(query, [*c.compress(of).visual, *c.compress(of).text], of.scale) for c in (built, loaded)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_the_family_is_registered() -> None:
    assert FAMILIES["compact"].config is CompactConfig
    config = CompactConfig.from_dict({"tile": 8, "ratios": [0.5, 0.25], "selector": "learned"})
    assert config.ratios == (0.5, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.0)}, r"retention ratio 0.0 is outside \(0, 1\]"),
        ({"ratios": (0.5, 1.5)}, r"retention ratio 1.5 is outside \(0, 1\]"),
        ({"bank": 0}, "bank 0: at least 1"),
        ({"passes": -1}, "passes -1: at least 0"),
        ({"hidden": 0}, "hidden 0: at least 1"),
        ({"selector": "random"}, "selector 'random' is neither 'attention' nor 'learned'"),
        ({"ridge": 0.0}, "ridge 0.0 must be positive"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"latent_bits": 5}, "5 bits cannot be packed"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactConfig(TILE, **{"ratios": (0.5, 0.5), **options})


def test_a_ratio_for_every_layer() -> None:
    with pytest.raises(ValueError, match="3 retention ratios for 2 layers"):
        CompactConfig(TILE, ratios=(0.5,) * 3).build(GEOMETRY, 0)


def test_an_empty_bank_is_refused_before_anything_is_stored() -> None:
    built = Capsule(CapsuleConfig("compact", CompactConfig(TILE, ratios=(0.5, 0.5)), GEOMETRY, "tiny"))
    with pytest.raises(RuntimeError, match="bank of queries is empty"):
        built.compress(prefill())

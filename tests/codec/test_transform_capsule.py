"""Transform code: the whole capsule, its bytes, its files and what encoding costs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, prefill, transform_capsule
from support.encode_macs import encode_macs
from support.transform_tiles import SIZES
from torch.utils.flop_counter import FlopCounterMode

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import FAMILIES
from kvcapsule.codec.transform import Transform, TransformConfig
from kvcapsule.errors import CapsuleError
from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.segment import storage_bytes


@pytest.fixture(params=[1, 2], ids=["each head", "heads together"])
def joint(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# The capsule


def test_what_fills_no_tile_is_raw_and_exact(joint: int) -> None:
    """24 tokens are two tiles of ten and four raw."""
    of = prefill()
    visual, text = transform_capsule(joint_heads=joint).compress(of)
    assert [(s.owner.tolist(), s.tokens) for s in visual] == [([0, 0, 1], TILE), ([0], 4)]
    assert isinstance(visual[0].keys, CodedRows) and isinstance(visual[0].values, CodedRows)
    assert torch.equal(visual[1].keys, of.keys[:1, :, 23:27])
    assert torch.equal(visual[1].values, of.values[:1, :, 23:27])
    assert sum(int(s.mask.sum()) if s.mask is not None else s.tokens * len(s.owner) for s in text) == 60 - 34


def test_bytes_are_those_of_the_widths_frames_and_owners(joint: int) -> None:
    capsule, of = transform_capsule(joint_heads=joint), prefill()
    coded, rest = capsule.compress(of).visual
    layer = capsule.layers[0]
    widths = int(layer.keys.transform.widths.sum()) + int(layer.values.transform.widths.sum())
    assert widths == {1: 36 + 66, 2: 18 + 35}[joint]
    assert storage_bytes(coded.entry_tensors()) == 3 * (widths + 2 * DIM // 2 * 8 + 8)
    assert storage_bytes(rest.entry_tensors()) == 4 * 2 * HEADS * DIM * 8 + 8
    chosen = coded.select(torch.tensor([1]))
    assert storage_bytes(iter((*chosen.keys.tensors(), *chosen.values.tensors()))) == widths


def test_decoders_are_the_parameters_that_reading_needs(joint: int) -> None:
    """Not the encoder; and its maps are not copied for the heads that share them."""
    capsule, sets = transform_capsule(joint_heads=joint), HEADS // joint
    coded = capsule.compress(prefill()).visual[0]

    def decoder(rows: int, channels: int) -> int:
        coding = sets * (rows // 8 * channels * (1 + 4) + rows * channels * 4)
        return coding + 4 * (sets * TILE * rows + HEADS * DIM * channels)

    assert storage_bytes(coded.parameter_tensors()) == decoder(8, 6) + decoder(16, 5)


def test_saved_and_loaded_it_reads_the_same(tmp_path: Path, joint: int) -> None:
    capsule, of = transform_capsule(joint_heads=joint), prefill()
    capsule.save_pretrained(tmp_path / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "capsule")
    assert loaded.config == capsule.config
    for layer in range(GEOMETRY.layers):
        of_layer = dataclasses.replace(of, layer=layer)
        ours, theirs = loaded.compress(of_layer), capsule.compress(of_layer)
        assert storage_bytes(ours.visual[0].entry_tensors()) == storage_bytes(theirs.visual[0].entry_tensors())
        for one, other in zip(ours.visual, theirs.visual, strict=True):
            for a, b in zip(one.materialize(torch.float64), other.materialize(torch.float64), strict=True):
                assert torch.equal(a, b)
        assert torch.equal(ours.visual[0].keys.packed, theirs.visual[0].keys.packed)


def test_widths_of_another_dtype_are_refused(tmp_path: Path) -> None:
    capsule = transform_capsule()
    codec = capsule.layers[1].values.transform
    codec.widths = codec.widths.int()
    capsule.save_pretrained(tmp_path / "capsule")
    with pytest.raises(
        CapsuleError, match=r"layers\.1\.values\.transform\.widths holds torch\.int32 and not torch\.uint8"
    ):
        Capsule.from_pretrained(tmp_path / "capsule")


def test_sizes_of_another_capsule_are_refused(tmp_path: Path) -> None:
    transform_capsule().save_pretrained(tmp_path / "capsule")
    path = tmp_path / "capsule" / "config.json"
    values = json.loads(path.read_text())
    values["codec"]["key_rows"] = [8, 16]
    path.write_text(json.dumps(values))
    with pytest.raises(
        CapsuleError, match=r"layers\.1\.keys\.transform\.widths has the shape \(2, 1, 6\) and not \(2, 2, 6\)"
    ):
        Capsule.from_pretrained(tmp_path / "capsule")


def test_the_family_is_registered() -> None:
    assert FAMILIES["transform"].config is TransformConfig
    config = transform_capsule(joint_heads=2).config
    assert CapsuleConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_sizes_follow_the_config_layer_by_layer() -> None:
    config = TransformConfig(
        12, key_rows=(8, 16), key_channels=(3, 4), value_rows=(24, 8), value_channels=(5, 6), joint_heads=2
    )
    for layer, (rows, channels) in enumerate([(8, 3), (16, 4)]):
        codec = config.build(GEOMETRY, layer).keys.transform
        shapes = {name: tuple(t.shape) for name, t in codec.state_dict().items()}
        wide = (1, 2 * DIM, channels)
        assert shapes == {
            "tokens_in": (1, rows, 12),
            "tokens_out": (1, 12, rows),
            "channels_in": wide,
            "channels_out": wide,
            "offset": (1, rows, channels),
            "step": (1, rows // 8, channels),
            "widths": (1, rows // 8, channels),
        }
    assert config.build(GEOMETRY, 1).values.transform.step.shape == (1, 1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile 0 must be at least 1"),
        ({"latent_bits": 4}, "latent_bits 4: .* bits of their own; leave it 0"),
        ({"latent_bits": 5}, "5 bits cannot be packed"),
        ({"key_rows": (8, 12)}, r"key_rows \[12\]: .* a multiple of 8"),
        ({"value_rows": (0, 16)}, r"value_rows \[0\]: .* a multiple of 8"),
        ({"value_rows": (-8, 16)}, r"value_rows \[-8\]: .* a multiple of 8"),
    ],
)
def test_configs_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformConfig(**{"tile": TILE, **SIZES, **options})


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_size_for_each_layer(name: str, count: int) -> None:
    config = TransformConfig(TILE, **{**SIZES, name: (8,) * count})
    with pytest.raises(ValueError, match=f"{count} {name} for 2 layers: give one for each layer"):
        Capsule(CapsuleConfig("transform", config, GEOMETRY, "tiny"))


@pytest.mark.parametrize("heads", [0, 3, 4])
def test_sets_that_do_not_divide_the_heads_are_refused(heads: int) -> None:
    config = TransformConfig(TILE, **SIZES, joint_heads=heads)
    with pytest.raises(ValueError, match=f"joint_heads {heads} does not divide 2 KV heads"):
        Capsule(CapsuleConfig("transform", config, GEOMETRY, "tiny"))


def test_the_maps_of_a_7b_class_model_are_small_and_pay_off_with_the_first_image() -> None:
    """32 layers of 8 KV heads of 128 in bfloat16, tiles of 64, every row and channel coded: the most that such maps can
    take."""
    layers, heads, dim, tile, visual = 32, 8, 128, 64, 576
    transform = Transform(head_groups=heads, heads=1, tile=tile, dim=dim, rows=tile, channels=dim).to(torch.bfloat16)
    maps = 2 * layers * transform.decoder_bytes()
    assert maps <= 32e6
    full = 2 * layers * heads * dim * visual * 2
    assert full / 20 + maps < full


def test_encoding_costs_the_multiply_adds_that_it_says() -> None:
    """Counted by PyTorch on the codecs themselves."""
    capsule, of = transform_capsule(), prefill()
    tiles = sum(span.length // TILE for span in of.spans)
    with FlopCounterMode(display=False) as counter:
        for codec in capsule.layers:
            for part, x in ((codec.keys, of.keys), (codec.values, of.values)):
                part.transform.coefficients(torch.cat([x[:1, :, :TILE]] * tiles))
    assert counter.get_total_flops() == 2 * tiles * encode_macs(capsule.config.codec, capsule.config.geometry)


def test_encoding_is_a_small_part_of_a_7b_class_prefill() -> None:
    """Seven billion weights are each read once a token; tiles of 64, every row and channel coded, 32 layers of 8 KV
    heads of 128."""
    geometry = dataclasses.replace(GEOMETRY, layers=32, kv_heads=8, query_heads=32, head_dim=128)
    every = {
        name: (size,) * 32
        for name, size in (("key_rows", 64), ("value_rows", 64), ("key_channels", 128), ("value_channels", 128))
    }
    nearest, shaped = (
        encode_macs(TransformConfig(tile=64, **every, joint_heads=1, readers=count), geometry) / 64 for count in (0, 64)
    )
    assert 0.001 * 7e9 < nearest < 0.002 * 7e9
    assert nearest < shaped < 0.005 * 7e9

"""The bound of what a transform code's maps take."""

import pytest

from kvcapsule.codec.coefficient_transform import CellTransform
from kvcapsule.codec.cross_layer import CrossLayerConfig
from kvcapsule.codec.grouping import joint_heads, joint_layers
from kvcapsule.codec.transform import TransformConfig
from kvcapsule.training.families.map_budget import default_limit, map_bytes, most_channels
from kvcapsule.vlm.geometry import KVGeometry

LARGE = KVGeometry("llava", layers=32, query_heads=32, kv_heads=8, head_dim=128, rotary="1d")
"""Of the 7B class."""
TILE = 64


def decoders(config: TransformConfig | CrossLayerConfig) -> int:
    """Bytes of what reads all layers of the large model, at 16 bits."""
    first = range(0, LARGE.layers, max(1, config.layer_group))
    codecs = [config.build(LARGE, layer).bfloat16() for layer in first]
    return sum(m.decoder_bytes() for codec in codecs for m in codec.modules() if isinstance(m, CellTransform))


DEFAULT = 32e6 / 2**20


@pytest.mark.parametrize("limit", [DEFAULT, 8.0])
def test_the_maps_of_a_7b_class_geometry_keep_within_their_bound(limit: float) -> None:
    """As training shapes them there unless told otherwise, with every channel coded that may be."""
    heads = joint_heads(LARGE.kv_heads, LARGE.head_dim)
    layers, sets = joint_layers(heads, LARGE.head_dim), LARGE.kv_heads // heads
    stacks = LARGE.layers // layers
    (channels,) = set(most_channels(limit, [(sets, 2 * layers * heads * LARGE.head_dim)] * stacks, TILE))
    cross = CrossLayerConfig(
        TILE, joint_layers=layers, joint_heads=heads, rows=(TILE,) * stacks, channels=(channels,) * stacks
    )
    (each,) = set(most_channels(limit, [(sets, heads * LARGE.head_dim)] * 2 * LARGE.layers, TILE))
    rows, columns = (TILE,) * LARGE.layers, (each,) * LARGE.layers
    alone = TransformConfig(
        TILE, key_rows=rows, key_channels=columns, value_rows=rows, value_channels=columns, joint_heads=heads
    )
    for config in (cross, alone):
        assert 0.97 * limit < decoders(config) / 2**20 <= limit or (config is alone and each == heads * LARGE.head_dim)


def test_the_default_bound_grows_with_the_model_and_spares_maps_of_whole_images() -> None:
    def sources(layers: int, heads: int) -> list[tuple[int, int]]:
        return [(heads, 2 * 2 * 128)] * (layers // 2)

    assert default_limit(32 * 8 * 128, sources(32, 8), TILE) == default_limit(4 * 2 * 32, [(1, 512)], 196) == DEFAULT
    assert default_limit(32 * 32 * 128, sources(32, 32), TILE) == 4 * DEFAULT, "a 7B whose heads have keys of their own"
    (share,) = {n / 512 for n in most_channels(4 * DEFAULT, sources(32, 32), TILE)}
    assert 0.35 < share < 0.5
    assert default_limit(32 * 32 * 128, sources(32, 32), 576) == 0


def test_bytes_are_those_of_the_decoder() -> None:
    config = CrossLayerConfig(50, joint_layers=2, joint_heads=2, rows=(56,) * 16, channels=(37,) * 16)
    assert decoders(config) == 16 * map_bytes(4, 2 * 2 * 2 * 128, 50, 37)


def test_no_bound_and_one_that_is_not_reached_leave_all_channels() -> None:
    assert most_channels(0, [(2, 64), (1, 512)], TILE) == [64, 512] == most_channels(1000, [(2, 64), (1, 512)], TILE)


def test_a_bound_below_one_channel_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"--transform\.max-map-mib 0\.008: the maps of one coded channel of every source take 0\.0"
    ):
        most_channels(0.008, [(1, 512)], TILE)

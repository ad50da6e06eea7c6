"""Multiply-adds of encoding, in closed form, which tests hold against counted ones."""

from kvcapsule.codec.cross_layer import CrossLayerConfig
from kvcapsule.codec.noise_shaping import shaping_macs
from kvcapsule.codec.transform import TransformConfig
from kvcapsule.vlm.geometry import KVGeometry


def encode_macs(config: TransformConfig | CrossLayerConfig, geometry: KVGeometry) -> int:
    """Multiply-adds of encoding one full tile in all layers."""
    return _cross_layer(config, geometry) if isinstance(config, CrossLayerConfig) else _transform(config, geometry)


def _transform(config: TransformConfig, geometry: KVGeometry) -> int:
    """Multiply-adds of encoding one full tile in all layers: both products of `Transform.coefficients`, token axis
    first, and noise shaping."""
    width, head_groups = geometry.head_dim * config.joint_heads, geometry.kv_heads // config.joint_heads
    sizes = list(
        zip((*config.key_rows, *config.value_rows), (*config.key_channels, *config.value_channels), strict=True)
    )
    coding = sum(head_groups * r * width * (config.tile + c) for r, c in sizes)
    if not config.readers:
        return coding
    reading = geometry.layers * geometry.kv_heads * config.readers * config.tile * geometry.head_dim
    return coding + reading + head_groups * sum(sum(shaping_macs(config.tile, r, c)) for r, c in sizes)


def _cross_layer(config: CrossLayerConfig, geometry: KVGeometry) -> int:
    """Multiply-adds of encoding one full tile in all layers: channels layer by layer, tokens group by group, and
    noise shaping."""
    width, head_groups = geometry.head_dim * config.joint_heads, geometry.kv_heads // config.joint_heads
    sizes = list(zip(config.depths(geometry), config.rows, config.channels, strict=True))
    coding = sum(head_groups * config.tile * c * (2 * depth * width + r) for depth, r, c in sizes)
    if not config.readers:
        return coding
    reading = geometry.layers * geometry.kv_heads * config.readers * config.tile * geometry.head_dim
    return coding + reading + head_groups * sum(sum(shaping_macs(config.tile, r, c)) for _, r, c in sizes)

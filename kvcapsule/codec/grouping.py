"""Default head groups and layer groups of a transform code: how many KV heads and layers are coded together."""

_HEADS = 128
"""Most channels of a set of KV heads: their map grows with the square."""
_LAYERS = 512
"""Most channels of a group of layers, keys and values of one set of heads."""


def joint_heads(kv_heads: int, head_dim: int) -> int:
    """KV heads of a set; divides their number."""
    return next(n for n in range(kv_heads, 0, -1) if kv_heads % n == 0 and (n == 1 or n * head_dim <= _HEADS))


def joint_layers(heads: int, head_dim: int) -> int:
    """Layers of a group, for sets of `heads` KV heads; the model may have fewer."""
    return max(1, _LAYERS // (2 * heads * head_dim))


def layer_groups(layers: int, joint: int) -> list[range]:
    """Runs of `joint` neighbouring layers; the last may be shorter."""
    return [range(first, min(first + joint, layers)) for first in range(0, layers, joint)]

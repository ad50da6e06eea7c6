"""Shapes of language parts by name: what the layers that are timed look like."""

from dataclasses import dataclass

from kvcapsule.vlm.geometry import KVGeometry


@dataclass(frozen=True)
class Shape:
    """A language part, as its config on the Hub has it. Rotations are timed as 1-D RoPE whatever the model's are: they
    cost the same."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    """Width of the residual stream."""
    intermediate: int
    """Width of the gated MLP."""
    vocab: int

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @property
    def layer(self) -> tuple[int, int, int]:
        """What a decode-attention call depends on."""
        return self.query_heads, self.kv_heads, self.head_dim

    def token_bytes(self, element: int) -> int:
        """Keys and values of one token in one layer; `element`: bytes of an element."""
        return 2 * self.kv_heads * self.head_dim * element

    def geometry(self, layers: int | None = None) -> KVGeometry:
        return KVGeometry("llava", layers or self.layers, self.query_heads, self.kv_heads, self.head_dim, "1d")


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llava-1.5-7b", 32, 32, 32, 128, 4096, 11008, 32064),
        Shape("llava-next-vicuna-7b", 32, 32, 32, 128, 4096, 11008, 32064),
        Shape("llava-next-mistral-7b", 32, 32, 8, 128, 4096, 14336, 32064),
        Shape("qwen2.5-vl-7b", 28, 28, 4, 128, 3584, 18944, 152064),
        Shape("internvl3-8b", 28, 28, 4, 128, 3584, 18944, 151674),
    )
}
"""Of what users run; layers that are alike are timed once (`distinct`)."""


def distinct(names: list[str]) -> dict[str, list[str]]:
    """The first name of each kind of layer, and the names of those that have the same."""
    found: dict[tuple[int, int, int], list[str]] = {}
    for name in names:
        found.setdefault(SHAPES[name].layer, []).append(name)
    return {first: rest for first, *rest in found.values()}

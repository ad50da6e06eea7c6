"""Shapes of language models by name, whose layers and decode steps are timed."""

from dataclasses import dataclass

from kvcapsule.vlm.geometry import KVGeometry


@dataclass(frozen=True)
class Shape:
    """A language model, as its config on the Hub has it. Rotations of all models are timed as 1-D RoPE, which costs the
    same as others."""

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
        """The sizes that a decode-attention call depends on."""
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
"""Shapes of models that people use; equal layers are timed once (`distinct`)."""

PAGES, KV_BOUND = "pages-vlm", "kv-bound"
"""The models below 7B that are timed: the demo VLM, and one with random weights."""
KV_BOUND_SHAPE = Shape(KV_BOUND, 4, 8, 4, 64, 256, 512, 512)
"""A small model with a long visual context: a step reads 13.1 MB of weights and, at 2,304 visual tokens, 18.9 MB of
keys and values a sequence, both in fp32."""
IMAGES = {
    KV_BOUND: (1, 48),
    "llava-1.5-7b": (1, 24),
    "llava-next-vicuna-7b": (5, 24),
    "llava-next-mistral-7b": (5, 24),
    "internvl3-8b": (13, 16),
    "qwen2.5-vl-7b": (16, 32),
}
"""Images of a sequence, and tokens of an image's side, of models with random weights: together as many visual tokens as
the named model has for a large image."""


def known_models() -> list[str]:
    """The models whose decode steps can be timed."""
    return [PAGES, *IMAGES]


def distinct(names: list[str]) -> dict[str, list[str]]:
    """The first name of each kind of layer, and the other names with equal layers."""
    by_layer: dict[tuple[int, int, int], list[str]] = {}
    for name in names:
        by_layer.setdefault(SHAPES[name].layer, []).append(name)
    return {first: rest for first, *rest in by_layer.values()}

"""What the KV of a model looks like."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig

from ..errors import GeometryError


@dataclass(frozen=True)
class KVGeometry:
    """Layers, heads and positions of a model's language part: all that decides whether a capsule fits it."""

    model_type: str
    """transformers' name of the model family, e.g. llava."""
    layers: int
    """Decoder layers, those without full attention included."""
    query_heads: int
    """Heads are those of the full-attention layers: some models have others where there is a window."""
    kv_heads: int
    head_dim: int
    rotary: str
    """Position scheme of their keys: "none", "1d", "mrope" (sections) or "mrope-interleaved"."""

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "KVGeometry":
        """Read the geometry from any VLM config of transformers.

        Raises:
            GeometryError: for models that read images by cross-attention, for those whose layers share keys and values,
                for configs without attention heads, and for those without full-attention layers or with unlike ones.
        """
        text = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False) or getattr(text, "cross_attention_layers", None):
            raise GeometryError(
                f"{config.model_type} is no decoder-only model: its visual tokens live in cross-attention, which"
                " capsules do not cover. Use a decoder-only VLM (LLaVA, Qwen-VL, InternVL, ...)."
            )
        if getattr(text, "num_kv_shared_layers", 0):
            raise GeometryError(
                f"{config.model_type}: its last {text.num_kv_shared_layers} layers read keys and values of earlier ones"
                " past the cache, which a CapsuleCache cannot serve. Use a model whose layers each hold their own."
            )
        if not hasattr(text, "num_attention_heads"):
            raise GeometryError(
                f"{config.model_type}: its text config names no num_attention_heads, so it has no KV cache to compress."
            )
        full = {_heads(text.per_layer_config[layer]) for layer in full_attention_layers(config)}
        if not full:
            raise GeometryError(
                f"{config.model_type}: none of its {text.num_hidden_layers} layers has full attention, so what it"
                " caches does not grow with the prompt, and there is nothing to compress."
            )
        if len(full) > 1:
            raise GeometryError(
                f"{config.model_type}: its full-attention layers differ in (query heads, KV heads, head dim):"
                f" {sorted(full)}; a capsule is for layers that are alike."
            )
        query_heads, kv_heads, head_dim = full.pop()
        return cls(
            str(config.model_type), int(text.num_hidden_layers), query_heads, kv_heads, head_dim, _rotary_scheme(text)
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KVGeometry":
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def require(self, other: "KVGeometry", what: str = "capsule") -> None:
        """Refuse `other` (a model's geometry) unless it equals this one; the message holds both."""
        if self != other:
            mine, theirs = self.to_dict(), other.to_dict()
            differing = ", ".join(f"{k}: {mine[k]} != {theirs[k]}" for k in mine if mine[k] != theirs[k])
            raise GeometryError(
                f"this {what} was made for another KV geometry ({differing}).\n  {what}: {mine}\n  model:   {theirs}\n"
                "Use the model that it was trained on, or train one for this model with `kvcapsule train --model ...`."
            )


def full_attention_layers(config: PreTrainedConfig) -> list[int]:
    """The layers whose cache grows with the prompt; sliding-window and linear-attention layers hold a bounded state and
    keep it."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        each = (text.per_layer_config[layer] for layer in range(text.num_hidden_layers))
        bounds = ([getattr(layer, name, None) for name in ("sliding_window", "attention_chunk_size")] for layer in each)
        kinds = ["full_attention" if bound == [None, None] else "sliding_attention" for bound in bounds]
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


_UNROTATED = ("cohere2",)
"""Text models that rotate the keys of their windowed layers alone, and whose config does not tell."""


def _heads(layer: Any) -> tuple[int, int, int]:
    """Query heads, KV heads and head dim of one layer's config."""
    heads = int(layer.num_attention_heads)
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _rotary_scheme(text: PreTrainedConfig) -> str:
    rope = getattr(text, "rope_parameters", None)
    if not rope or text.model_type in _UNROTATED:
        return "none"
    if "rope_theta" not in rope and any(isinstance(v, dict) for v in rope.values()):
        rope = rope.get("full_attention") or next(v for v in rope.values() if isinstance(v, dict))
    if rope.get("mrope_section"):
        return "mrope-interleaved" if rope.get("mrope_interleaved") else "mrope"
    return "1d"

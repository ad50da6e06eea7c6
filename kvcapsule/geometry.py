"""What the KV of a model looks like."""

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig


class GeometryError(ValueError):
    """A capsule, a cache or a request does not fit the model's KV."""


@dataclass(frozen=True)
class KVGeometry:
    """Layers, heads and positions of a model's language part: all that decides whether a capsule fits it."""

    model_type: str
    """transformers' name of the model family, e.g. llava."""
    layers: int
    """Decoder layers, those without full attention included."""
    query_heads: int
    kv_heads: int
    head_dim: int
    rotary: str
    """Position scheme of the keys: "none", "1d", "mrope" (sections) or "mrope-interleaved"."""

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> "KVGeometry":
        """Read the geometry from any VLM config of transformers.

        Raises:
            GeometryError: for models that read images by cross-attention and for configs without attention heads.
        """
        text = config.get_text_config(decoder=True)
        if getattr(config, "is_encoder_decoder", False) or getattr(text, "cross_attention_layers", None):
            raise GeometryError(
                f"{config.model_type} is no decoder-only model: its visual tokens live in cross-attention, which capsules do not cover. "
                "Use a decoder-only VLM (LLaVA, Qwen-VL, InternVL, ...)."
            )
        heads = getattr(text, "num_attention_heads", None)
        if heads is None:
            raise GeometryError(f"{config.model_type}: its text config names no num_attention_heads, so it has no KV cache to compress.")
        return cls(
            model_type=str(config.model_type),
            layers=int(text.num_hidden_layers),
            query_heads=int(heads),
            kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            rotary=_rotary_scheme(text),
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
    """The layers whose cache grows with the prompt; sliding-window and linear-attention layers hold a bounded state and keep it."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def _rotary_scheme(text: PreTrainedConfig) -> str:
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return "none"
    if "rope_theta" not in rope and any(isinstance(v, dict) for v in rope.values()):
        rope = next(v for v in rope.values() if isinstance(v, dict))
    if rope.get("mrope_section"):
        return "mrope-interleaved" if rope.get("mrope_interleaved") else "mrope"
    return "1d"

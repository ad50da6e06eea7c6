"""KV geometry: the layers, KV heads, head dim and rotary scheme of a model's language part."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ..errors import GeometryError
from ..field_checks import check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROTARY_SCHEMES = ("none", "1d", "mrope", "mrope-interleaved")
_MOST = {"layers": 4096, "query_heads": 65536, "kv_heads": 65536, "head_dim": 65536}
"""Far above any model; a file that asks for more is damaged."""
_SOME = "full_attention"
"""The field that a file has only where it says something."""


@dataclass(frozen=True)
class KVGeometry:
    """KV geometry of a model's language part. A capsule fits a model if and only if their geometries are equal."""

    model_type: str
    """transformers' name of the model family, e.g. llava."""
    layers: int
    """Number of decoder layers, including those without full attention."""
    query_heads: int
    """Heads of the full-attention layers (this field and the two below): sliding-window layers may have others."""
    kv_heads: int
    head_dim: int
    rotary: str
    """Rotary scheme of their keys: "none", "1d", "mrope" (sections) or "mrope-interleaved"."""
    full_attention: Sequence[int] = ()
    """Indices of the layers with full attention in a model that has others too; empty: all layers have it."""

    @property
    def capsule_layers(self) -> Sequence[int]:
        """Indices of the layers that capsules are for, in their order: those with full attention. A capsule's codecs
        are numbered by their place among these."""
        return self.full_attention or range(self.layers)

    def place(self, layer: int) -> int:
        """Number of a layer among the `capsule_layers`.

        Raises:
            GeometryError: for the index of another layer.
        """
        try:
            return self.capsule_layers.index(layer)
        except ValueError:
            raise GeometryError(
                f"layer {layer} holds no capsule: of its {self.layers} layers, {self.model_type} has full attention in"
                f" {list(self.capsule_layers)}."
            ) from None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.query_heads // self.kv_heads

    @classmethod
    def from_config(cls, config: "PreTrainedConfig") -> "KVGeometry":
        """Read the geometry from the config of any VLM of transformers.

        Raises:
            GeometryError: if the model reads images by cross-attention, its layers share keys and values, its config
                has no attention heads, it has no full-attention layer, or these differ in their heads.
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
        indices = full_attention_layers(config)
        full = {_heads(text.per_layer_config[layer]) for layer in indices}
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
        layers = int(text.num_hidden_layers)
        some = () if len(indices) == layers else tuple(indices)
        return cls(str(config.model_type), layers, query_heads, kv_heads, head_dim, _rotary_scheme(text), some)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "KVGeometry":
        """The geometry in a capsule's config.

        Raises:
            GeometryError, ConfigError: that names the key which is unknown, is missing, or has a value that no model
                has.
        """
        names = [field.name for field in fields(cls)]
        if wrong := sorted((set(values) ^ set(names)) - {_SOME}):
            raise GeometryError(f"geometry has {', '.join(names)}; unknown or missing: {', '.join(wrong)[:200]}.")
        geometry = cls(**values)
        check_fields(geometry)
        geometry = replace(geometry, full_attention=tuple(geometry.full_attention))
        for name, most in _MOST.items():
            if not 1 <= getattr(geometry, name) <= most:
                raise GeometryError(f"geometry.{name} {getattr(geometry, name)} is outside 1 to {most:,}.")
        if geometry.query_heads % geometry.kv_heads:
            raise GeometryError(
                f"geometry.query_heads {geometry.query_heads} is no multiple of kv_heads {geometry.kv_heads}."
            )
        if geometry.rotary not in ROTARY_SCHEMES:
            raise GeometryError(
                f"geometry.rotary {repr(geometry.rotary)[:80]} is unknown; it is one of {', '.join(ROTARY_SCHEMES)}."
            )
        some = geometry.full_attention
        rising = all(one < other for one, other in zip((-1, *some), (*some, geometry.layers), strict=True))
        if not rising or len(some) == geometry.layers or (_SOME in values and not some):
            raise GeometryError(
                f"geometry.{_SOME} {repr(list(some))[:80]} is to hold some of the layers 0 to {geometry.layers - 1},"
                " each once and in order; where all have full attention the key is left out."
            )
        return geometry

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON has them; `full_attention` only where it says something."""
        values = asdict(self)
        some = values.pop(_SOME)
        return {**values, _SOME: list(some)} if some else values

    def require(self, other: "KVGeometry", what: str = "capsule") -> None:
        """Raise GeometryError, with both geometries in the message, unless `other` (a model's) equals this one."""
        if self != other:
            capsule, model = self.to_dict(), other.to_dict()
            both = ((name, capsule.get(name, "all"), model.get(name, "all")) for name in {**capsule, **model})
            differing = ", ".join(f"{name}: {one} != {two}" for name, one, two in both if one != two)
            raise GeometryError(
                f"this {what} was made for another KV geometry ({differing}).\n"
                f"  {what}: {capsule}\n  model:   {model}\n"
                "Use the model that it was trained on, or train one for this model with `kvcapsule train --model ...`."
            )


def full_attention_layers(config: "PreTrainedConfig") -> list[int]:
    """Indices of the layers whose cache grows with the prompt, that is all but sliding-window and linear-attention
    layers, whose state is bounded and stays uncompressed."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        layers = (text.per_layer_config[layer] for layer in range(text.num_hidden_layers))
        windows = ("sliding_window", "attention_chunk_size")
        bounds = ([getattr(layer, name, None) for name in windows] for layer in layers)
        kinds = ["full_attention" if bound == [None, None] else "sliding_attention" for bound in bounds]
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


_UNROTATED = ("cohere2",)
"""Text models that rotate keys in their sliding-window layers alone, which their config does not say."""


def _heads(layer: Any) -> tuple[int, int, int]:
    """(query heads, KV heads, head dim) from one layer's config."""
    heads = int(layer.num_attention_heads)
    kv_heads = int(getattr(layer, "num_key_value_heads", None) or heads)
    return heads, kv_heads, int(getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _rotary_scheme(text: "PreTrainedConfig") -> str:
    rope = getattr(text, "rope_parameters", None)
    if not rope or text.model_type in _UNROTATED:
        return "none"
    if "rope_theta" not in rope and any(isinstance(v, dict) for v in rope.values()):
        rope = rope.get("full_attention") or next(v for v in rope.values() if isinstance(v, dict))
    if rope.get("mrope_section"):
        return "mrope-interleaved" if rope.get("mrope_interleaved") else "mrope"
    return "1d"

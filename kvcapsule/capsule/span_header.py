"""Header of a stored span: all that is known of it without its numbers."""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import CapsuleError
from ..methods.tiles import tile_starts
from ..segments.rotary_frame import Frame

SPAN_FORMAT_VERSION = 1
"""Raised whenever this code could not read, or would misread, what an earlier one wrote, or the other way round."""
FRAMES = ("none", "half-split", "interleaved")
_KV_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MOST_TOKENS = 2**31
_LONGEST_TEXT = 1000


@dataclass(frozen=True)
class SpanHeader:
    """What a stored span is, of which model and capsule, and where it stood in its prompt.

    Raises:
        CapsuleError: for a value of the wrong type or out of range.
    """

    capsule: str
    """Digest of the capsule (kvcapsule.capsule.digest.capsule_digest)."""
    family: str
    """Codec family of the capsule."""
    base_model: str
    """The model that the capsule was trained on."""
    dtype: str
    """Of the model's keys and values, which raw rows keep: float16, bfloat16, float32 or float64."""
    grid: tuple[int, int, int]
    """Token grid (t, h, w) of the span."""
    tile: int
    """Visual tokens of a tile."""
    align: int
    """Tiles begin at the span's first multiple of so many tokens of the prompt; 1: at its first token. A multiple of
    the capsule's: an engine's tiles begin at its blocks."""
    frame: str
    """How keys of tiles are stored: "none", as the model rotated them; "half-split" or "interleaved", as if each tile
    began at position 0, with the rotation of its first position beside them."""
    start: int
    """Tokens of the prompt before the span, padding not counted: the logical position of its first token."""
    length: int
    """Visual tokens."""
    text: int
    """Tokens of text right before the span whose raw rows are stored with it: all since the span before."""
    layers: tuple[int, ...]
    """Indices of the layers, ascending."""
    weights: str = ""
    """Digest of the model's weights, as whoever stored the span gave it; "" if nobody did."""
    adapter: str = ""
    """Digest or name of an adapter on the model, as `weights`."""
    format_version: int = SPAN_FORMAT_VERSION

    def __post_init__(self) -> None:
        require_version(self.format_version)
        for name in ("capsule", "family", "base_model", "weights", "adapter"):
            value = getattr(self, name)
            self._require(isinstance(value, str) and len(value) <= _LONGEST_TEXT, name, "a string")
        self._require(
            isinstance(self.dtype, str) and self.dtype in _KV_DTYPES, "dtype", f"one of {', '.join(_KV_DTYPES)}"
        )
        self._require(self.frame in FRAMES, "frame", f"one of {', '.join(FRAMES)}")
        for name, least in (("tile", 1), ("align", 1), ("start", 0), ("length", 1), ("text", 0)):
            self._require(_is_count(getattr(self, name), least), name, f"a whole number of {least} or more")
        self._require(self.text <= self.start, "text", f"at most start, {self.start}")
        self._require(
            isinstance(self.grid, tuple) and len(self.grid) == 3 and all(_is_count(n, 1) for n in self.grid),
            "grid",
            "three whole numbers of 1 or more",
        )
        self._require(
            self.grid[0] * self.grid[1] * self.grid[2] == self.length, "grid", f"a product of length, {self.length}"
        )
        ascending = (
            isinstance(self.layers, tuple)
            and len(self.layers) > 0
            and all(_is_count(layer, 0) for layer in self.layers)
            and all(one < other for one, other in zip(self.layers, self.layers[1:], strict=False))
        )
        self._require(ascending, "layers", "ascending whole numbers, one at least")

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            value = repr(getattr(self, name))
            shown = value if len(value) <= 80 else value[:77] + "..."
            raise CapsuleError(f"{name} {shown} in the header of a stored span: expected {expected}.")

    @property
    def tiles(self) -> int:
        """Full tiles of the span."""
        return len(self.tile_starts)

    @property
    def tile_starts(self) -> range:
        """Logical positions of the tiles' first tokens."""
        return tile_starts(self.start, self.length, self.tile, self.align)

    @property
    def rest(self) -> int:
        """Tokens that are in no tile, at its beginning and its end."""
        return self.length - self.tiles * self.tile

    @property
    def end(self) -> int:
        """Logical position of the token behind it."""
        return self.start + self.length

    @property
    def kv_dtype(self) -> torch.dtype:
        """`dtype` as PyTorch's."""
        return _KV_DTYPES[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SpanHeader":
        """Raises CapsuleError for another format version, and for missing, unknown and wrong values."""
        require_version(values.get("format_version"))
        names = {field.name for field in fields(cls)}
        if missing := sorted(names - values.keys()):
            raise CapsuleError(f"the header of a stored span lacks {', '.join(missing)}: it is damaged.")
        if unknown := sorted(values.keys() - names):
            raise CapsuleError(f"the header of a stored span has unknown keys {', '.join(map(repr, unknown))[:200]}.")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)


def require_version(version: Any) -> None:
    """Raises CapsuleError unless this is the format version that this code reads."""
    if type(version) is not int or version != SPAN_FORMAT_VERSION:
        raise CapsuleError(
            f"format version {repr(version)[:80]} of a stored span; this version of kvcapsule reads"
            f" {SPAN_FORMAT_VERSION}. Upgrade kvcapsule, or encode the image again."
        )


def frame_name(frame: Frame | None) -> str:
    """The name of tiles' frames in a header."""
    return FRAMES[0] if frame is None else FRAMES[1 + frame.interleaved]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a model's dtype in a header.

    Raises:
        CapsuleError: for one in which no model keeps its KV.
    """
    names = {of: name for name, of in _KV_DTYPES.items()}
    if dtype not in names:
        raise CapsuleError(f"keys and values of {dtype} cannot be stored; they may be {', '.join(_KV_DTYPES)}.")
    return names[dtype]


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < _MOST_TOKENS

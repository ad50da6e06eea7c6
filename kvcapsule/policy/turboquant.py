"""TurboQuant (arXiv 2504.19874): every visual token in 2 to 4 bits a channel, after a random rotation that makes one
codebook fit all rows.

    x' = x R                      R [D, D]: a random rotation, the same for all rows;  q k = (q R) k',  p v = (p v') R^T
    x^ = |x| levels[code]         code: the nearest level to a channel of x' / |x|
                                  levels: Lloyd and Max's for a Gaussian of variance 1 / D

"mse" is this. "product" spends one of the bits of a key on a sketch of what the others miss, which makes q k right on
average over sketches (kvcapsule.segments.sketched_rows).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from ..errors import ConfigError, GeometryError
from ..methods.kept_rows import gather_kept
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed
from ..segments.codebook_rows import CodebookRows
from ..segments.hadamard import hadamard
from ..segments.segment import Segment
from ..segments.sketched_rows import SketchedRows
from ..vlm.geometry import KVGeometry
from .base import VisualPolicy

BITS = (2, 3, 4)
FORMS = ("mse", "product")
ROTATIONS = ("random", "hadamard")


@dataclass(frozen=True)
class TurboQuant(VisualPolicy):
    """Keys and values of all visual tokens in `bits` bits a channel, and 2 bytes a row for its length ("product": 4 for
    a key).

    Bits for an element: bits + 16 / D, in whatever precision the model runs. Codes are packed; the rotation is a matrix
    in attention (q_map, out_map), one for all layers, heads and sequences. Reading builds the rows in full: it saves
    memory, not time.

    Values are always "mse". vLLM's presets differ: it rotates keys alone, by a Hadamard matrix without signs, rounds
    values evenly between their least and their greatest, leaves the first and the last two layers raw, stores text and
    written tokens alike, and has no "product" form, which its authors found to hurt: unbiased, it has the greater
    variance. The paper's halves of bits (2.5, 3.5), which give some channels a bit more, are not here.
    """

    bits: int = 4
    """Bits of a channel: 2, 3 or 4."""
    form: str = "mse"
    """Of the keys: "mse" or "product"."""
    keep_length: bool = False
    """Read rows as long as they were (vLLM's norm correction). Rounding to the nearest level shortens them, by 12 % of
    the squared length at 2 bits."""
    rotation: str = "random"
    """"random": of all rotations. "hadamard": a Walsh-Hadamard matrix behind random signs, for an even head dim."""
    seed: int = 0
    """Of the rotation and the sketch."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits {self.bits}: TurboQuant has 2, 3 or 4.")
        for name, choice, among in (("form", self.form, FORMS), ("rotation", self.rotation, ROTATIONS)):
            if choice not in among:
                raise ConfigError(f"{name} {choice!r} is neither {' nor '.join(map(repr, among))}.")

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError for channels that cannot be rotated."""
        if self.rotation == "hadamard" and geometry.head_dim % 2:
            raise GeometryError(f"a head dim of {geometry.head_dim} has no Walsh-Hadamard rotation.")

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        return Compressed([self._pack(segment) for segment in gather_kept(prefill, prefill.visual())], text)

    def _pack(self, segment: Segment) -> Segment:
        assert isinstance(segment.keys, torch.Tensor) and isinstance(segment.values, torch.Tensor)
        device, heads, dim = segment.keys.device, segment.keys.shape[1], segment.keys.shape[3]
        rotation = rotation_of(dim, self.rotation, self.seed, device)
        rotated = segment.keys.float() @ rotation
        keys: CodebookRows | SketchedRows
        if self.form == "mse":
            keys, q_map = CodebookRows.pack(rotated, self.bits, self.keep_length), rotation
        else:
            keys = SketchedRows.pack(rotated, self.bits, sketch_of(dim, self.seed, device), self.keep_length)
            q_map = _query_map(dim, self.rotation, self.seed, device)
        value_rotation = rotation_of(segment.values.shape[3], self.rotation, self.seed, device)
        values = CodebookRows.pack(segment.values.float() @ value_rotation, self.bits, self.keep_length)
        return Segment(
            keys,
            values,
            segment.owner,
            q_map=q_map.expand(heads, *q_map.shape),
            out_map=value_rotation.T.expand(heads, *value_rotation.shape),
            mask=segment.mask,
        )


@lru_cache(maxsize=16)
def rotation_of(dim: int, kind: str, seed: int, device: torch.device) -> torch.Tensor:
    """R [D, D] fp32. All callers share the tensor, so it must not be written to."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        if kind == "hadamard":
            signs = torch.randint(2, (dim, 1), generator=generator) * 2 - 1
            mixed: torch.Tensor = signs * hadamard(dim, torch.float64)
            return mixed.to(device, torch.float32)
        drawn = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
        # With these signs all rotations are equally likely.
        rotation: torch.Tensor = drawn.Q * drawn.R.diagonal().sign()
        return rotation.to(device, torch.float32)


@lru_cache(maxsize=16)
def sketch_of(dim: int, seed: int, device: torch.device) -> torch.Tensor:
    """S [D, D] fp32; not to be written to."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed + 1)
        return torch.randn(dim, dim, generator=generator, dtype=torch.float64).to(device, torch.float32)


@lru_cache(maxsize=16)
def _query_map(dim: int, kind: str, seed: int, device: torch.device) -> torch.Tensor:
    """[D, 2 D]: the rotated query, and its sketch."""
    with torch.inference_mode(False):
        rotation = rotation_of(dim, kind, seed, device)
        return torch.cat([rotation, rotation @ sketch_of(dim, seed, device).T], dim=1)

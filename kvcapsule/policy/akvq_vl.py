"""AKVQ-VL (arXiv 2501.15021): every token stays, in 2, 4 or 16 bits by what its layer attends to, after a
Walsh-Hadamard rotation.

    layer type                  16 bits              4 bits        2 bits
    text-salient (TSA)          recent               other text    other visual
    pivot-token-salient (PSA)   recent and pivots                  all other

    k' = k H,  v' = v H  (H orthonormal, k after RoPE);  q k = (q H) k',  p v = (p v') H^T
    x^ = s (clip(round(x / s) + z, 0, 2^n - 1) - z)     s = (c - a) / (2^n - 1),  z = -round(a / s)

over each token's groups of at most 128 channels, with a and c their least and greatest value times a clip ratio.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from ..errors import ConfigError, GeometryError
from ..methods.kept_rows import gather_apart
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, DecodeState, DecodeTimeMethod
from ..segments.group_quantized_rows import GroupedRows
from ..segments.hadamard import hadamard
from ..segments.packed_rows import Rows
from ..segments.quantized_rows import check_bits
from ..segments.segment import Segment
from ..vlm.geometry import KVGeometry
from .attention_scores import attention_received
from .base import Policy
from .budgets import ranks
from .recent_window import cut, entries, merge_coded

OBSERVED = 32
"""Last prompt queries whose attention "auto" measures: they see all, so that early tokens are not favoured as by a mean
over all."""
PIVOT = "pivot"
"""Segment.tag of rows that stay raw. Otherwise a tag is the number of bits of a segment's codes: of raw rows, once they
leave the window."""
_LEAST_INTERVAL = 32
"""Written tokens that leave the window together at least, however short it is."""


@dataclass(frozen=True)
class AkvqVl(Policy, DecodeTimeMethod):
    """Text and visual tokens alike are stored in few bits; what is raw is the recent window, and pivots where they draw
    the attention.

    Pivots are the tokens with massive activations in the residual stream, as it enters the layer: `attach` hands it
    over (LayerPrefill.hidden). They are found once, in the prompt; no written token becomes one.

    The window: the prompt's last `recent` tokens (of each row, padding not counted) and all that is written are raw.
    Whenever as many tokens are written as the window is long (32 at least), what has left it is stored as its like in
    the prompt, written tokens as text; between `recent` and twice as many tokens are raw then. Tokens written before a
    later image leave the window at the first such time after it. A later turn with an image is typed, and its pivots
    are found, among its own tokens.

    Not the paper's: the rotation is a matrix product here, not the fast transform; q_map and out_map apply it in
    attention, in place of weights that are fused with it. Codes are packed; step and zero are stored in the dtype of
    the rows (the paper names none), and the zero as s z, which reads the same. `read` builds the rows in the working
    precision: this saves memory, not time.
    """

    reads_question = True
    needs_hidden_states = True
    window: ClassVar[int] = 0
    """It looks at no queries while it acts."""

    text_layers: Literal["auto"] | Sequence[int] = "auto"
    """Which layers are text-salient: their indices, or "auto", where the prompt decides for each row and layer.

    "auto": text-salient is a row in whose layer a text token draws more attention from the prompt's last queries than a
    visual token does and than a pivot does, each in the mean; recent tokens, which are raw in both types, are left out,
    and pivots count as pivots only. The paper compares attention per token and modality as well, but offline, on a
    benchmark, which would have to be run for every model. Not checked on its models. A row without such text, or
    without images, is decided by the same rule: nothing draws no attention. With indices no attention is computed; the
    paper's are (0, 1) for LLaVA-1.5-7B and none, (), for LLaVA-1.6-Mistral-7B.
    """
    recent: int = 128
    """Last tokens that are raw."""
    pivots: int = 15
    """Raw tokens of a row in a pivot-token-salient layer: those with the greatest activation of any channel.

    The paper gives no threshold. RotateKV's code, of the same first author, takes the 20 greatest activations, several
    of which may be of one token; counted by tokens, the bytes do not depend on that.
    """
    bits: int = 2
    """Bits of one code."""
    text_bits: int = 4
    """Bits of one code of text in a text-salient layer; more than `bits`."""
    clip: float = 0.8
    """Factor of a group's least and greatest value, which are then the range of its codes of `bits` (applied so in
    RotateKV's code)."""
    group: int = 128
    """Channels of a token that share a step and a zero; a head of fewer is one group."""

    def __post_init__(self) -> None:
        if isinstance(self.text_layers, str) and self.text_layers != "auto":
            raise ConfigError(f"text_layers {self.text_layers!r}: 'auto', or the indices of the text-salient layers.")
        for name, count in (("recent", self.recent), ("pivots", self.pivots)):
            if count < 0:
                raise ConfigError(f"{name} {count} counts tokens: 0 or more.")
        if self.group < 1:
            raise ConfigError(f"group {self.group}: at least one channel is needed.")
        if not 0 < self.clip <= 1:
            raise ConfigError(f"clip {self.clip} is outside (0, 1], where 1 clips nothing.")
        check_bits(self.bits)
        check_bits(self.text_bits)
        if self.text_bits <= self.bits:
            raise ConfigError(
                f"text_bits {self.text_bits} are to be more than the {self.bits} bits of all that is not salient."
            )

    @property
    def interval(self) -> int:
        """Written tokens after which the window moves."""
        return max(self.recent, _LEAST_INTERVAL)

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Raises GeometryError for layers that the model has not, or channels that cannot be rotated."""
        if not isinstance(self.text_layers, str) and any(
            not 0 <= layer < geometry.layers for layer in self.text_layers
        ):
            raise GeometryError(
                f"text_layers {tuple(self.text_layers)}: the model's layers are 0 to {geometry.layers - 1}."
            )
        if geometry.head_dim % 2:
            raise GeometryError(f"a head dim of {geometry.head_dim} has no Walsh-Hadamard rotation.")

    @torch.no_grad()
    def compress(self, prefill: LayerPrefill) -> Compressed:
        """Raises ValueError if a row may be pivot-token-salient and the prefill brings no hidden states."""
        recent = prefill.valid.clone()
        recent[:, : max(0, recent.shape[1] - self.recent)] = False
        pivot, salient = self._types(prefill, recent)
        visual = prefill.visual()
        text = prefill.valid & ~visual
        parts = [(visual, self.bits), (text & salient, self.text_bits), (text & ~salient, self.bits)]
        masks = [
            mask
            for chosen, _ in parts
            for mask in (chosen & pivot, chosen & ~pivot & recent, chosen & ~pivot & ~recent)
        ]
        rows = gather_apart(prefill, masks)
        stored = [self._store(bits, *rows[3 * i : 3 * i + 3]) for i, (_, bits) in enumerate(parts)]
        return Compressed(stored[0], stored[1] + stored[2])

    def _types(self, prefill: LayerPrefill, recent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pivots of pivot-token-salient rows, [B, N] bool, and which rows are text-salient, [B, 1] bool."""
        if not isinstance(self.text_layers, str) and prefill.layer in self.text_layers:
            return torch.zeros_like(recent), torch.ones_like(recent[:, :1])
        pivot = massive(prefill, self.pivots)
        if not isinstance(self.text_layers, str):
            return pivot, torch.zeros_like(recent[:, :1])
        received = attention_received(prefill, max(0, recent.shape[1] - OBSERVED)).sum(dim=1)
        visual, other = prefill.visual(), prefill.valid & ~recent & ~pivot
        of_text, of_visual, of_pivots = (
            _mean(received, of) for of in (other & ~visual, other & visual, pivot & ~recent)
        )
        salient = (of_text > of_visual) & (of_text > of_pivots)
        return pivot & ~salient, salient

    def _store(self, bits: int, pivots: list[Segment], recent: list[Segment], others: list[Segment]) -> list[Segment]:
        """Segments of raw tokens as they are stored, with `bits` bits where they are coded."""
        return [
            *(replace(s, tag=PIVOT) for s in pivots),
            *(replace(s, tag=bits) for s in recent),
            *(self._coded(s, bits) for s in others),
        ]

    def _coded(self, raw: Segment, bits: int) -> Segment:
        keys, q_map = self._pack(raw.keys, bits)
        values, out_map = self._pack(raw.values, bits)
        return Segment(keys, values, raw.owner, q_map=q_map, out_map=out_map, mask=raw.mask, tag=bits)

    def _pack(self, x_EHMD: Rows, bits: int) -> tuple[GroupedRows, torch.Tensor]:
        """Rows in codes, and the rotation [H, D, D] that they are read through, which is its own inverse."""
        assert isinstance(x_EHMD, torch.Tensor)
        heads, dim = x_EHMD.shape[1], x_EHMD.shape[3]
        work = torch.promote_types(x_EHMD.dtype, torch.float32)
        rotation = hadamard(dim, work, x_EHMD.device)
        rotated = (x_EHMD.to(work) @ rotation).to(x_EHMD.dtype)
        clip = 1.0 if bits == self.text_bits else self.clip
        rows = GroupedRows.pack(rotated, bits, min(self.group, dim), along_tokens=False, clip=clip, zero_is_code=True)
        return rows, rotation.expand(heads, dim, dim)

    def decode_time(self) -> DecodeTimeMethod:
        return self

    @torch.no_grad()
    def on_decode(self, state: DecodeState) -> Compressed:
        """Store what has left the window: what was recent before, and of the tail all but its last tokens."""
        salient = self._text_salient(state)
        tail = Segment(state.keys, state.values, torch.arange(len(salient), device=salient.device), mask=state.valid)
        left = max(0, tail.tokens - self.recent)
        visual, pivots, coded = [], [], []
        for s in state.visual:
            if isinstance(s.tag, int) and not isinstance(s.keys, GroupedRows):
                visual.append(self._coded(s, s.tag))
            else:
                visual.append(s)
        for s in (*state.text, cut(tail, 0, left)):
            if isinstance(s.keys, GroupedRows):
                coded.append(s)
            elif s.tag is None:
                coded += [self._coded(part, bits) for part, bits in self._by_type(s, salient)]
            elif isinstance(s.tag, int):
                coded.append(self._coded(s, s.tag))
            else:
                pivots.append(s)
        recent = [replace(part, tag=bits) for part, bits in self._by_type(cut(tail, left, tail.tokens), salient)]
        return Compressed(visual, [*pivots, *recent, *merge_coded(coded)])

    def _text_salient(self, state: DecodeState) -> torch.Tensor:
        """[B] bool: the rows that are text-salient in this layer; where the prompt decided, what is stored of its text
        tells."""
        salient = torch.zeros(state.keys.shape[0], dtype=torch.bool, device=state.keys.device)
        if not isinstance(self.text_layers, str):
            return salient | (state.layer in self.text_layers)
        for s in state.text:
            if s.tag == self.text_bits:
                salient[s.owner] = True
        return salient

    def _by_type(self, raw: Segment, salient: torch.Tensor) -> list[tuple[Segment, int]]:
        """The entries of text-salient rows and those of the others, with the bits of their codes."""
        if raw.tokens == 0:
            return []
        parts = (
            (salient[raw.owner].nonzero()[:, 0], self.text_bits),
            ((~salient[raw.owner]).nonzero()[:, 0], self.bits),
        )
        return [(entries(raw, index), bits) for index, bits in parts if len(index)]


def _mean(received_BN: torch.Tensor, of_BN: torch.Tensor) -> torch.Tensor:
    """[B, 1]: the mean over the tokens that are marked; 0 where none is."""
    return (received_BN * of_BN).sum(dim=1, keepdim=True) / of_BN.sum(dim=1, keepdim=True).clamp_min(1)


def massive(prefill: LayerPrefill, count: int) -> torch.Tensor:
    """[B, N] bool: each row's `count` valid tokens with the greatest absolute activation of any channel of the residual
    stream.

    Raises:
        ValueError: if the prefill brings no hidden states and count is not 0.
    """
    if count == 0:
        return torch.zeros_like(prefill.valid)
    if prefill.hidden is None:
        raise ConfigError(
            "this prefill brings no hidden states, in which AKVQ-VL finds its pivots: attach the method that the cache"
            " was made with (`with attach(model, method)`), or do without pivots (pivots=0)."
        )
    peak = prefill.hidden.abs().amax(dim=-1).float().masked_fill(~prefill.valid, -torch.inf)
    return prefill.valid & (ranks(peak) < count)

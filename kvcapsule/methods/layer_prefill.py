"""What a method sees of one layer when its prefill ends, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch

from ..segments.rotary_frame import Frame
from ..segments.segment import Segment
from ..vlm.spans import VisualSpan


@dataclass(frozen=True)
class LayerPrefill:
    """One layer's keys, values and queries of the tokens of one forward, rotated as the model does.

    Shapes: B rows, N tokens (left padding included), H KV heads, D head dim.
    """

    layer: int
    query: torch.Tensor
    """[B, H * G, N, D]."""
    keys: torch.Tensor
    """[B, H, N, D]."""
    values: torch.Tensor
    """[B, H, N, D]."""
    spans: Sequence[VisualSpan]
    """Visual spans, positions counted within these N tokens."""
    valid: torch.Tensor
    """[B, N] bool: False at padding."""
    scale: float
    """Factor of the attention scores."""
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None
    """The model's rotary cos and sin, each [B or 1, N, R]; None for models without RoPE."""
    shared: dict[tuple[int, bool, torch.device], "_Cut"] = field(default_factory=dict)
    """What the layers of one forward (those of one device) have in common, so that it is computed and stored once."""
    hidden: torch.Tensor | None = None
    """[B, N, C]: the residual stream as it enters the layer, for a method that asks (kvcapsule.methods.method.reads_hidden); None otherwise."""

    def visual(self) -> torch.Tensor:
        """[B, N] bool: True at visual tokens."""
        marked = torch.zeros_like(self.valid)
        for span in self.spans:
            marked[span.row, span.start : span.start + span.length] = True
        return marked

    def without_queries(self) -> "LayerPrefill":
        """The same without queries and hidden states, for those who hold it longer than they need them."""
        return replace(self, query=self.query[:, :, :0].clone(), hidden=None)

    def without_last(self, tokens: int) -> "LayerPrefill":
        """The prefill as it would be had its last `tokens` tokens not been fed.

        Raises:
            ValueError: if a visual span reaches into them.
        """
        if tokens == 0:
            return self
        end = self.keys.shape[2] - tokens
        if end < 0 or any(span.start + span.length > end for span in self.spans):
            raise ValueError(
                f"cannot remove {tokens} tokens of a prefill of {self.keys.shape[2]}: they are more, or an image is among them."
            )
        rotation = self.position_embeddings
        return replace(
            self,
            query=self.query[:, :, :end],
            keys=self.keys[:, :, :end],
            values=self.values[:, :, :end],
            valid=self.valid[:, :end],
            position_embeddings=None if rotation is None else (rotation[0][..., :end, :], rotation[1][..., :end, :]),
            hidden=None if self.hidden is None else self.hidden[:, :end],
        )


class Compressed(NamedTuple):
    """A layer's prefill as segments, visual and text apart so that their bytes can be told apart."""

    visual: list[Segment]
    text: list[Segment]


class Method(Protocol):
    """Anything that turns a layer's prefill into segments: a capsule or a policy."""

    def compress(self, prefill: LayerPrefill) -> Compressed:
        """Called once for each layer as its prefill ends, in the order of the layers."""


_SLACK = 1.25
"""Padded rows may hold this many times the tokens that they keep; past it, rows of each length get a segment of their own."""


def keep(prefill: LayerPrefill, kept: torch.Tensor, slack: float = _SLACK) -> list[Segment]:
    """The tokens that `kept` [B, N] (every head alike) marks, as raw rows; none at all gives no segment.

    Rows that keep fewer than the fullest are padded to its length where that is little, and the padding counts as stored bytes: `slack`
    times the tokens that are kept, at most.
    """
    counts = kept.sum(dim=1)
    rows = counts.nonzero()[:, 0]
    if rows.numel() == 0:
        return []
    if bool(kept.all()):
        return [Segment(prefill.keys.contiguous(), prefill.values.contiguous(), rows, each_row=True)]
    present = counts[rows]
    if int(present.max()) * len(rows) <= slack * int(present.sum()):
        return [_gather(prefill, kept, rows)]
    return [_gather(prefill, kept, rows[present == count]) for count in present.unique()]


def _gather(prefill: LayerPrefill, kept: torch.Tensor, rows: torch.Tensor) -> Segment:
    counts = kept[rows].sum(dim=1)
    longest = int(counts.max())
    order = torch.sort((~kept[rows]).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    mask = None
    if bool((counts < longest).any()):
        mask = torch.arange(longest, device=kept.device) < counts[:, None]
        # The padding repeats a token of the row's own: what is measured over a row (a range, a mean) then sees no stranger.
        order = torch.where(mask, order, order[:, :1])

    def take(x_BHND: torch.Tensor) -> torch.Tensor:
        return x_BHND.transpose(1, 2)[rows[:, None], order].transpose(1, 2).contiguous()

    return Segment(take(prefill.keys), take(prefill.values), rows, mask=mask, each_row=len(rows) == len(kept))


UNEVEN = 1.02
"""As _SLACK, for budgets that differ from head to head or from row to row by a method's design: they are to be what they say, in bytes."""


def keep_heads(prefill: LayerPrefill, kept: torch.Tensor) -> list[Segment]:
    """The tokens that `kept` [B, H, N] marks for each KV head by itself, as raw rows: what a head does not keep is not stored for it.

    Where all heads of every row keep equally many, their rows lie side by side, [E, H, M, D]; otherwise each entry is of one head
    (Segment.head), entries of like length share a segment, and none is padded by more than 2 %.
    """
    counts = kept.sum(dim=2)
    if not bool(counts.any()):
        return []
    if bool((counts == counts[:, :1]).all()):
        # What a head keeps is moved to the front, where all heads then keep the same places.
        order = torch.sort((~kept).to(torch.int8), dim=2, stable=True).indices[..., None]
        moved = [x.gather(2, order.expand(-1, -1, -1, x.shape[3])) for x in (prefill.keys, prefill.values)]
        front = torch.arange(kept.shape[2], device=kept.device) < counts[:, :1]
        return keep(replace(prefill, keys=moved[0], values=moved[1]), front, UNEVEN)
    pairs = counts.flatten().nonzero()[:, 0]
    pairs = pairs[counts.flatten()[pairs].argsort(descending=True, stable=True)]
    segments, lengths = [], counts.flatten()[pairs].tolist()
    begin = 0
    while begin < len(lengths):
        end = begin + sum(lengths[begin] <= n * UNEVEN for n in lengths[begin:])
        segments.append(_gather_heads(prefill, kept, pairs[begin:end].sort().values))
        begin = end
    return segments


def _gather_heads(prefill: LayerPrefill, kept: torch.Tensor, pairs: torch.Tensor) -> Segment:
    heads = kept.shape[1]
    chosen = kept.flatten(0, 1)[pairs]
    counts = chosen.sum(dim=1)
    longest = int(counts.max())
    order = torch.sort((~chosen).to(torch.int8), dim=1, stable=True).indices[:, :longest]
    mask = None
    if bool((counts < longest).any()):
        mask = torch.arange(longest, device=kept.device) < counts[:, None]
        order = torch.where(mask, order, order[:, :1])
    keys, values = (x.flatten(0, 1)[pairs[:, None], order][:, None].contiguous() for x in (prefill.keys, prefill.values))
    return Segment(keys, values, pairs // heads, mask=mask, head=pairs % heads)


class Tiles(NamedTuple):
    """The full tiles of all visual spans of one forward, of T tokens each."""

    keys: torch.Tensor
    """[E, H, T, D]."""
    values: torch.Tensor
    """[E, H, T, D]."""
    owner: torch.Tensor
    """[E] batch row."""
    frame: Frame | None
    """The rotation of each tile's first position; None where it was not asked for or the model has none."""


class _Cut(NamedTuple):
    rows: torch.Tensor
    frame: Frame | None
    lent: dict[str, torch.Tensor]
    """Memory for keys and for values of tiles, which one layer has after the other."""


def cut_tiles(prefill: LayerPrefill, tile: int, frames: bool = True, turned: bool = False, lent: bool = False) -> Tiles | None:
    """Cut every span into tiles of `tile` tokens; what is left at a span's end is in no tile. None where nothing fills a tile.

    In memory a head's tiles follow one another, as its tokens do in the prefill.

    Args:
        turned: keys as if each tile began at position 0, where there is a frame.
        lent: tiles may lie in the prefill's own memory (those of a single span need no copy), or in what the next layer's are written to:
            copy what is to stay.
    """
    spans = [(s.row, s.start, s.length // tile) for s in prefill.spans if s.length >= tile]
    if not spans:
        return None
    device = prefill.keys.device
    cut = prefill.shared.get((tile, frames, device))
    if cut is None:
        starts = [(row, start + i * tile) for row, start, count in spans for i in range(count)]
        rows, firsts = (t.contiguous() for t in torch.tensor(starts, device=device).unbind(1))
        frame = None
        if frames and prefill.position_embeddings is not None:
            frame = Frame.at(*prefill.position_embeddings, rows, firsts)
        cut = prefill.shared[tile, frames, device] = _Cut(rows, frame, {})

    def made(name: str, x_BHND: torch.Tensor, frame: Frame | None) -> torch.Tensor:
        views = _where_they_are(x_BHND, spans, tile)
        if lent and frame is None and len(views) == 1:
            return views[0]
        wanted = (x_BHND.shape[1], len(cut.rows), tile, x_BHND.shape[3])
        room = cut.lent.get(name) if lent else None
        if room is None or room.shape != wanted or room.dtype != x_BHND.dtype:
            room = x_BHND.new_empty(wanted)
            # Fresh pages cost a CPU more than the copy; elsewhere memory is kept for the next who asks.
            if lent and device.type == "cpu":
                cut.lent[name] = room
        return _copied(views, room.transpose(0, 1), frame)

    keys, values = made("keys", prefill.keys, cut.frame if turned else None), made("values", prefill.values, None)
    return Tiles(keys, values, cut.rows, cut.frame)


def _where_they_are(x_BHND: torch.Tensor, spans: Sequence[tuple[int, int, int]], tile: int) -> list[torch.Tensor]:
    """The tiles of each span (row, start, number of tiles), [n, H, T, D]."""
    return [x_BHND[row, :, start : start + count * tile].unflatten(1, (count, tile)).transpose(0, 1) for row, start, count in spans]


def _copied(views: Sequence[torch.Tensor], out_EHTD: torch.Tensor, frame: Frame | None) -> torch.Tensor:
    """Spans one after the other in out, turned back by a frame if there is one."""
    first = 0
    for view in views:
        at = slice(first, first + len(view))
        if frame is None:
            out_EHTD[at] = view
        else:
            frame.select(at).back_into(view, out_EHTD[at])
        first = at.stop
    return out_EHTD


def tiled(prefill: LayerPrefill, tile: int) -> torch.Tensor:
    """[B, N] bool: True at the tokens that `cut_tiles` takes."""
    marked = torch.zeros_like(prefill.valid)
    for span in prefill.spans:
        marked[span.row, span.start : span.start + span.length // tile * tile] = True
    return marked

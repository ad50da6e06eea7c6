"""Tiles of visual spans: cut from a prefill, with the rotary frame of each."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..segments.rotary_frame import Frame
from .layer_prefill import LayerPrefill


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


def cut_tiles(
    prefill: LayerPrefill, tile: int, frames: bool = True, turned: bool = False, lent: bool = False
) -> Tiles | None:
    """Cut every span into tiles of `tile` tokens; what is left at a span's end is in no tile. None where nothing fills
    a tile.

    In memory a head's tiles follow one another, as its tokens do in the prefill.

    Args:
        turned: keys as if each tile began at position 0, where there is a frame.
        lent: tiles may lie in the prefill's own memory (those of a single span need no copy), or in what the next
            layer's are written to: copy what is to stay.
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
    return [
        x_BHND[row, :, start : start + count * tile].unflatten(1, (count, tile)).transpose(0, 1)
        for row, start, count in spans
    ]


def _copied(views: Sequence[torch.Tensor], out_EHTD: torch.Tensor, frame: Frame | None) -> torch.Tensor:
    """Spans one after the other in out, turned back by a frame if there is one."""
    first = 0
    for view in views:
        at = slice(first, first + len(view))
        if frame is None:
            out_EHTD[at] = view
        else:
            frame.select(at).unrotate_into(view, out_EHTD[at])
        first = at.stop
    return out_EHTD


def tiled(prefill: LayerPrefill, tile: int) -> torch.Tensor:
    """[B, N] bool: True at the tokens that `cut_tiles` takes."""
    marked = torch.zeros_like(prefill.valid)
    for span in prefill.spans:
        marked[span.row, span.start : span.start + span.length // tile * tile] = True
    return marked

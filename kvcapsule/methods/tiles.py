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


class _TileGrid(NamedTuple):
    """What the layers of one forward have in common: where the tiles are."""

    owner: torch.Tensor
    frame: Frame | None
    buffers: dict[str, torch.Tensor]
    """Memory of the tiles' keys and values that each layer overwrites, for those who borrow it."""


def cut_tiles(
    prefill: LayerPrefill, tile: int, frames: bool = True, derotated: bool = False, borrowed: bool = False
) -> Tiles | None:
    """Cut every span into tiles of `tile` tokens; what is left at a span's end is in no tile. None where nothing fills
    a tile.

    In memory a head's tiles follow one another, as its tokens do in the prefill.

    Args:
        prefill: of the layer.
        tile: T.
        frames: whether each tile's rotary frame is wanted.
        derotated: keys as if each tile began at position 0, where there is a frame.
        borrowed: the tiles are not copies: they may be views of the prefill (a single span's need no copy), or lie in a
            buffer that the next layer's tiles overwrite.
    """
    spans = [(s.row, s.start, s.length // tile) for s in prefill.spans if s.length >= tile]
    if not spans:
        return None
    device = prefill.keys.device
    grid = prefill.shared.get((tile, frames, device))
    if grid is None:
        starts = [(row, start + i * tile) for row, start, count in spans for i in range(count)]
        owner, firsts = (t.contiguous() for t in torch.tensor(starts, device=device).unbind(1))
        frame = None
        if frames and prefill.position_embeddings is not None:
            frame = Frame.at(*prefill.position_embeddings, owner, firsts)
        grid = prefill.shared[tile, frames, device] = _TileGrid(owner, frame, {})

    def tiles_of(name: str, x_BHND: torch.Tensor, frame: Frame | None) -> torch.Tensor:
        views = _views(x_BHND, spans, tile)
        if borrowed and frame is None and len(views) == 1:
            return views[0]
        shape = (x_BHND.shape[1], len(grid.owner), tile, x_BHND.shape[3])
        buffer = grid.buffers.get(name) if borrowed else None
        if buffer is None or buffer.shape != shape or buffer.dtype != x_BHND.dtype:
            buffer = x_BHND.new_empty(shape)
            # Fresh pages cost a CPU more than the copy; elsewhere the allocator keeps memory for the next call.
            if borrowed and device.type == "cpu":
                grid.buffers[name] = buffer
        return _copied(views, buffer.transpose(0, 1), frame)

    keys = tiles_of("keys", prefill.keys, grid.frame if derotated else None)
    return Tiles(keys, tiles_of("values", prefill.values, None), grid.owner, grid.frame)


def _views(x_BHND: torch.Tensor, spans: Sequence[tuple[int, int, int]], tile: int) -> list[torch.Tensor]:
    """The tiles of each span (row, start, number of tiles), [n, H, T, D]."""
    return [
        x_BHND[row, :, start : start + count * tile].unflatten(1, (count, tile)).transpose(0, 1)
        for row, start, count in spans
    ]


def _copied(views: Sequence[torch.Tensor], out_EHTD: torch.Tensor, frame: Frame | None) -> torch.Tensor:
    """Spans one after the other in out, rotated back by a frame if there is one."""
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

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


def tile_starts(start: int, length: int, tile: int, align: int = 1) -> range:
    """Where the tiles of a visual span begin: at its first multiple of `align`, then every `tile` tokens, as long as
    they are full.

    Every other token of the span is in no tile and stored raw.

    Args:
        start: position of the span's first token. Positions count from the sequence's first token, padding not counted
            (LayerPrefill.position); with an align of 1 any other count does as well.
        length: of the span, in tokens.
        tile: tokens of a tile, a multiple of `align`.
        align: such as the block size of a paged cache; 1: tiles begin at the span's first token.
    """
    return range(-(-start // align) * align, start + length - tile + 1, tile)


class TileRun(NamedTuple):
    """The full tiles of one visual span, which lie side by side."""

    row: int
    start: int
    """Of the first tile, among the tokens of the forward, padding included."""
    tiles: int


def tile_runs(prefill: LayerPrefill, tile: int, align: int = 1) -> Sequence[TileRun]:
    """The tiles of all visual spans of one forward, span by span; spans without a full tile are left out."""
    key = ("tile runs", tile, align)
    runs: Sequence[TileRun] | None = prefill.shared.get(key)
    if runs is None:
        runs = prefill.shared[key] = [
            TileRun(span.row, span.start + starts[0] - position, len(starts))
            for span in prefill.spans
            for position in [prefill.position(span) if align > 1 else span.start]
            if (starts := tile_starts(position, span.length, tile, align))
        ]
    return runs


class _TileGrid(NamedTuple):
    """What the layers of one forward have in common: where the tiles are."""

    owner: torch.Tensor
    frame: Frame | None
    buffers: dict[str, torch.Tensor]
    """Memory of the tiles' keys and values that each layer overwrites, for those who borrow it."""


def cut_tiles(
    prefill: LayerPrefill,
    tile: int,
    frames: bool = True,
    derotated: bool = False,
    borrowed: bool = False,
    align: int = 1,
) -> Tiles | None:
    """Cut every span into tiles of `tile` tokens (`tile_starts`). None where nothing fills a tile.

    In memory a head's tiles follow one another, as its tokens do in the prefill.

    Args:
        prefill: of the layer.
        tile: T.
        frames: whether each tile's rotary frame is wanted.
        derotated: keys as if each tile began at position 0, where there is a frame.
        borrowed: the tiles are not copies: they may be views of the prefill (a single span's need no copy), or lie in a
            buffer that the next layer's tiles overwrite.
        align: where tiles begin.
    """
    runs = tile_runs(prefill, tile, align)
    if not runs:
        return None
    device = prefill.keys.device
    key = (tile, align, frames, device)
    grid = prefill.shared.get(key)
    if grid is None:
        starts = [(row, start + i * tile) for row, start, count in runs for i in range(count)]
        owner, firsts = (t.contiguous() for t in torch.tensor(starts, device=device).unbind(1))
        frame = None
        if frames and prefill.position_embeddings is not None:
            frame = Frame.at(*prefill.position_embeddings, owner, firsts)
        grid = prefill.shared[key] = _TileGrid(owner, frame, {})

    def tiles_of(name: str, x_BHND: torch.Tensor, frame: Frame | None) -> torch.Tensor:
        views = _views(x_BHND, runs, tile)
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


def _views(x_BHND: torch.Tensor, runs: Sequence[TileRun], tile: int) -> list[torch.Tensor]:
    """The tiles of each run, [n, H, T, D]."""
    return [
        x_BHND[row, :, start : start + count * tile].unflatten(1, (count, tile)).transpose(0, 1)
        for row, start, count in runs
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


def tiled(prefill: LayerPrefill, tile: int, align: int = 1) -> torch.Tensor:
    """[B, N] bool: True at the tokens that `cut_tiles` takes."""
    marked = torch.zeros_like(prefill.valid)
    for row, start, count in tile_runs(prefill, tile, align):
        marked[row, start : start + count * tile] = True
    return marked

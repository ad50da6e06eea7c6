"""Where the visual tokens of a prompt are."""

from collections.abc import Mapping
from math import isqrt
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig


class VisualSpan(NamedTuple):
    """The run of positions that one image or video fills in one row of a batch."""

    row: int
    """Row of the batch."""
    start: int
    """First position, counted in the sequence as the model is given it (padding included)."""
    length: int
    grid: tuple[int, int, int]
    """Token grid (t, h, w); (1, 1, length) where the inputs do not tell."""


def find_spans(config: PreTrainedConfig, input_ids: torch.Tensor, inputs: Mapping[str, Any] | None = None) -> list[VisualSpan]:
    """The visual spans of a (left-padded) batch, by row and then by position.

    Args:
        config: the VLM's config; its image and video token ids mark the spans.
        input_ids: [B, N] token ids after the processor has put one placeholder for each visual token.
        inputs: the model's other inputs; image_grid_thw and video_grid_thw (or the features in mm_encoder_outputs, which is all that
            generate leaves of an image, or, where all images give equally many tokens, the number of images in pixel_values) tell
            images apart that follow each other without text between them.

    Raises:
        ValueError: if the placeholders do not agree with the grids.
    """
    inputs = inputs or {}
    spans: list[VisualSpan] = []
    for kind in ("image", "video"):
        token = getattr(config, f"{kind}_token_id", None)
        if token is None:
            token = getattr(config, f"{kind}_token_index", None)
        if token is None:
            continue
        runs = _runs(input_ids == token)
        spans += _split(runs, _grids(config, kind, inputs, sum(length for *_, length in runs)), kind)
    return sorted(spans)


def _runs(marked: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, start, length) of every run of True in [B, N]."""
    edge = torch.zeros(marked.shape[0], 1, dtype=torch.int8, device=marked.device)
    steps = torch.diff(torch.cat([edge, marked.to(torch.int8), edge], dim=1), dim=1)
    starts, ends = (steps == 1).nonzero().tolist(), (steps == -1).nonzero().tolist()
    return [(row, start, end - start) for (row, start), (_, end) in zip(starts, ends, strict=True)]


def _grids(config: PreTrainedConfig, kind: str, inputs: Mapping[str, Any], total: int) -> list[tuple[int, int, int]] | None:
    """The token grid of each image or video in the order of the prompt, or None where the inputs do not tell."""
    thw = inputs.get(f"{kind}_grid_thw")
    if thw is not None:
        merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        return [(int(t), int(h) // merge, int(w) // merge) for t, h, w in thw.tolist()]
    lengths = _feature_lengths((inputs.get("mm_encoder_outputs") or {}).get(kind))
    if lengths and sum(lengths) == total:
        return [_square(length) for length in lengths]
    pixels = inputs.get("pixel_values")
    if kind == "image" and isinstance(pixels, torch.Tensor) and pixels.dim() == 4 and total and total % pixels.shape[0] == 0:
        return [_square(total // pixels.shape[0])] * pixels.shape[0]
    return None


def _feature_lengths(encoded: Any) -> list[int]:
    """Tokens of each image or video that was encoded before; none where they lie in one row."""
    features: Any = getattr(encoded, "pooler_output", None)
    apart = isinstance(features, (list, tuple)) or (isinstance(features, torch.Tensor) and features.dim() == 3)
    return [len(one) for one in features] if apart else []


def _split(runs: list[tuple[int, int, int]], grids: list[tuple[int, int, int]] | None, kind: str) -> list[VisualSpan]:
    if grids is None:
        return [VisualSpan(row, start, length, _square(length)) for row, start, length in runs]
    if sum(length for *_, length in runs) == 0:
        return []
    spans, waiting = [], iter(grids)
    for row, start, length in runs:
        left = length
        while left > 0:
            grid = next(waiting, None)
            size = grid[0] * grid[1] * grid[2] if grid else 0
            if grid is None or size == 0 or size > left:
                # The placeholders of one image are cut by other tokens (row separators, frame time stamps): each run is a span.
                return [VisualSpan(r, s, n, _square(n)) for r, s, n in runs]
            spans.append(VisualSpan(row, start + length - left, size, grid))
            left -= size
    if next(waiting, None) is not None:
        raise ValueError(
            f"the inputs describe {len(grids)} {kind}s, but the prompt has placeholders for {len(spans)}: check the processor's output."
        )
    return spans


def _square(length: int) -> tuple[int, int, int]:
    side = isqrt(length)
    return (1, side, side) if side * side == length else (1, 1, length)

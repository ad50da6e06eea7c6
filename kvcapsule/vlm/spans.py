"""Visual spans: the positions of each image's or video's tokens in a prompt."""

from collections.abc import Mapping
from math import isqrt
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class VisualSpan(NamedTuple):
    """Consecutive positions of one image or video in one row of a batch."""

    row: int
    """Row of the batch."""
    start: int
    """First position in the model's input sequence, padding included."""
    length: int
    grid: tuple[int, int, int]
    """Token grid (t, h, w); (1, 1, length) if the inputs do not specify it."""


_PICTURES = ("mm_encoder_outputs", "image_embeds", "video_embeds", "image_hidden_states", "image_features")


def has_pictures(inputs: Mapping[str, Any]) -> bool:
    """Whether a forward's inputs bring images or videos: without any, placeholders are tokens as all others are."""
    return any(
        value is not None and (name.startswith("pixel_values") or name in _PICTURES) for name, value in inputs.items()
    )


def find_spans(
    config: "PreTrainedConfig", input_ids: torch.Tensor, inputs: Mapping[str, Any] | None = None
) -> list[VisualSpan]:
    """Find the visual spans of a (left-padded) batch, sorted by row and then by position.

    Args:
        config: the VLM's config; its image and video token ids mark the spans.
        input_ids: [B, N] token ids, with one placeholder per visual token, as the processor writes them.
        inputs: the model's other inputs. Adjacent images without text between them are separated by image_grid_thw and
            video_grid_thw, else by the features in mm_encoder_outputs (all that `generate` passes on), else by the
            number of images in pixel_values, if all images have the same number of tokens. Without any of these,
            M-RoPE position_ids [3 or more, B, N] give the grid of a span.

    Raises:
        ValueError: if the number of placeholders does not match the grids.
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
    positions = inputs.get("position_ids")
    if (
        isinstance(positions, torch.Tensor)
        and positions.dim() == 3
        and positions.shape[0] >= 3
        and positions.shape[1:] == input_ids.shape
    ):
        spans = [_with_position_grid(span, positions[-3:]) for span in spans]
    return sorted(spans)


def _runs(marked: torch.Tensor) -> list[tuple[int, int, int]]:
    """(row, start, length) of each maximal run of True in marked [B, N]."""
    edge = torch.zeros(marked.shape[0], 1, dtype=torch.int8, device=marked.device)
    steps = torch.diff(torch.cat([edge, marked.to(torch.int8), edge], dim=1), dim=1)
    starts, ends = (steps == 1).nonzero().tolist(), (steps == -1).nonzero().tolist()
    return [(row, start, end - start) for (row, start), (_, end) in zip(starts, ends, strict=True)]


def _grids(
    config: "PreTrainedConfig", kind: str, inputs: Mapping[str, Any], total: int
) -> list[tuple[int, int, int]] | None:
    """Token grid of each image or video in the order of the prompt; None if the inputs do not specify it."""
    thw = inputs.get(f"{kind}_grid_thw")
    if thw is not None:
        merge = int(getattr(config.vision_config, "spatial_merge_size", 1))
        return [(int(t), int(h) // merge, int(w) // merge) for t, h, w in thw.tolist()]
    encoded = _feature_grids((inputs.get("mm_encoder_outputs") or {}).get(kind))
    if encoded and sum(t * h * w for t, h, w in encoded) == total:
        return encoded
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    if kind != "image" or not isinstance(pixels, torch.Tensor) or total == 0 or total % pixels.shape[0]:
        return None
    # A tensor of full images has one size by its shape; a tensor of patches needs image_sizes.
    alike = pixels.dim() == 4 if sizes is None else bool((sizes == sizes[:1]).all())
    return [_square(total // pixels.shape[0])] * pixels.shape[0] if alike else None


def _feature_grids(encoded: Any) -> list[tuple[int, int, int]]:
    """Token grids of images or videos that were already encoded; empty if their features are concatenated."""
    features: Any = getattr(encoded, "pooler_output", None)
    injected = getattr(encoded, "deepstack_features", None)
    if injected and isinstance(injected[0][0], int):
        # Granite Vision injects features at several layers, as (layer, features per image), none at the embeddings.
        features = injected[0][1]
    if not isinstance(features, (list, tuple)) and not (isinstance(features, torch.Tensor) and features.dim() == 3):
        return []
    # A video's features may have a frame axis: [t, tokens, channels].
    grids = [
        (one.shape[0], _square(one.shape[1])) if one.dim() == 3 else (1, _square(one.shape[0])) for one in features
    ]
    return [(frames, h, w) for frames, (_, h, w) in grids]


def _with_position_grid(span: VisualSpan, positions_3BN: torch.Tensor) -> VisualSpan:
    """The span with the grid of its M-RoPE positions (time, height, width), if these form a full grid."""
    positions = positions_3BN[:, span.row, span.start : span.start + span.length]
    t, h, w = (int(axis.unique().numel()) for axis in positions)
    return span._replace(grid=(t, h, w)) if t * h * w == span.length else span


def _split(runs: list[tuple[int, int, int]], grids: list[tuple[int, int, int]] | None, kind: str) -> list[VisualSpan]:
    if grids is None:
        return [VisualSpan(row, start, length, _square(length)) for row, start, length in runs]
    if sum(length for *_, length in runs) == 0:
        return []
    spans = _assign_grids(runs, grids, kind)
    if spans is None:
        # Other tokens cut the placeholders of one image or video: time stamps between the frames, separators between
        # the rows.
        spans = _assign_grids(runs, [(1, h, w) for t, h, w in grids for _ in range(t)], f"{kind} frame")
    return [VisualSpan(row, start, length, _square(length)) for row, start, length in runs] if spans is None else spans


def _assign_grids(
    runs: list[tuple[int, int, int]], grids: list[tuple[int, int, int]], kind: str
) -> list[VisualSpan] | None:
    """Assign the grids, in order, to the runs; None if a grid does not fit into the rest of its run."""
    spans, remaining = [], iter(grids)
    for row, start, length in runs:
        left = length
        while left > 0:
            grid = next(remaining, None)
            size = grid[0] * grid[1] * grid[2] if grid else 0
            if grid is None or size == 0 or size > left:
                return None
            spans.append(VisualSpan(row, start + length - left, size, grid))
            left -= size
    if next(remaining, None) is not None:
        raise ValueError(
            f"the inputs describe {len(grids)} {kind}s, but the prompt has placeholders for {len(spans)}: check the"
            " processor's output."
        )
    return spans


def _square(length: int) -> tuple[int, int, int]:
    side = isqrt(length)
    return (1, side, side) if side * side == length else (1, 1, length)

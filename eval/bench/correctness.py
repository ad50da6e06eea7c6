"""Check of each method's output against attention in double precision, before it is timed."""

from collections.abc import Sequence

import torch

from kvcapsule.segments.segment import Segment

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Largest |output - truth| / |truth| by precision."""
_ROWS = 3
"""Sequences of the batch that are compared: the first, the last and one between."""


def rows(batch: int) -> list[int]:
    """Which sequences of a batch of so many are compared."""
    return sorted({0, batch // 2, batch - 1})[:_ROWS]


def over_segments(query: torch.Tensor, segments: Sequence[Segment], scale: float) -> torch.Tensor:
    """The truth for `rows` of the batch: softmax over the full keys and values that the segments stand for, [R, H * G,
    D]."""
    return torch.stack(
        [
            _row(query[row, :, 0].double(), [s.select(torch.tensor([row])) for s in segments], scale)
            for row in rows(len(query))
        ]
    )


def over_rows(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """The same for plain keys and values [B, H, N, D]."""
    return torch.stack(
        [
            _attention(query[row, :, 0].double(), keys[row].double(), values[row].double(), scale)
            for row in rows(len(query))
        ]
    )


def error(out: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error of an output [B, H * G, 1, D]; infinite if it holds NaN."""
    output = out[rows(len(out)), :, 0].double()
    relative = float((output - truth).norm() / truth.norm())
    return relative if relative == relative else float("inf")


def _row(query: torch.Tensor, segments: Sequence[Segment], scale: float) -> torch.Tensor:
    keys, values, bias = [], [], []
    for segment in segments:
        k_EHND, v_EHND = segment.materialize(torch.float64)
        bias_EHN = segment.score_bias(torch.float64)
        b_EHN = k_EHND.new_zeros(k_EHND.shape[:3]) if bias_EHN is None else bias_EHN
        keys.append(k_EHND.transpose(0, 1).flatten(1, 2))
        values.append(v_EHND.transpose(0, 1).flatten(1, 2))
        bias.append(b_EHN.transpose(0, 1).flatten(1, 2))
    return _attention(query, torch.cat(keys, 1), torch.cat(values, 1), scale, torch.cat(bias, 1))


def _attention(
    q: torch.Tensor, k_HND: torch.Tensor, v_HND: torch.Tensor, scale: float, bias: torch.Tensor | None = None
) -> torch.Tensor:
    scores = q.view(len(k_HND), -1, q.shape[-1]) @ k_HND.transpose(1, 2) * scale
    if bias is not None:
        scores = scores + bias[:, None]
    return (scores.softmax(-1) @ v_HND).flatten(0, 1)

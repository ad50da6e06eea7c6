"""Attention over segments on the CPU: mapped segments in one pass each, all others by the reference's steps with compiled products."""

from collections.abc import Sequence

import torch

from ...segment import Segment
from .. import reference
from . import mapped
from .read import COMPILED

_MOST_ROWS = 64
"""Query rows of a KV head; more is work for matrix products."""


def attend(query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend."""
    one_pass = [s for s in segments[: None if visible is None else -1] if _covered(query, s)]
    if not one_pass:
        return reference.attend(query, segments, scale, visible, COMPILED)
    batch, dim = query.shape[0], query.shape[3]
    q_BHRD = (query * scale).reshape(batch, one_pass[0].keys.shape[1], -1, dim)
    parts = [mapped.attend(q_BHRD, s) for s in one_pass]
    rest = [s for s in segments if not any(s is covered for covered in one_pass)]
    if rest:
        out, top, mass = reference.summed(query, rest, scale, visible, COMPILED)
        parts.append((out, top.masked_fill(top == torch.inf, -torch.inf), mass))
    outs, tops, masses = zip(*parts, strict=True)
    if len(parts) == 1:
        total, mass = outs[0], masses[0]
    else:
        highest = torch.stack(tops).amax(dim=0).clamp_min(torch.finfo(query.dtype).min)
        factors = [(top - highest).exp_() for top in tops]
        total = sum(out * factor[..., None] for out, factor in zip(outs, factors, strict=True))
        mass = sum(mass * factor for mass, factor in zip(masses, factors, strict=True))
    return (total / mass.clamp_min(torch.finfo(query.dtype).tiny)[..., None]).view(query.shape)


def _covered(query: torch.Tensor, segment: Segment) -> bool:
    if query.dtype != torch.float32 or (torch.is_grad_enabled() and query.requires_grad):
        return False
    rows = query.shape[1] // segment.keys.shape[1] * query.shape[2]
    return 0 < rows <= _MOST_ROWS and mapped.covers(segment)

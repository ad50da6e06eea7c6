"""Quantisation with gradients: codes are rounded forward, and backward what lies in range passes straight through
(Bengio et al., 2013).

The step learns as in LSQ (arXiv 1902.08153): inside the range from the rounding error, outside it from the range's end.
"""

import torch

from kvcapsule.codec.transform import CellTransform
from kvcapsule.segments.bit_packing import GROUP


def coded(
    transform: CellTransform, coefficients_ESMC: torch.Tensor, weights_EST: torch.Tensor | None = None
) -> torch.Tensor:
    """The rows [E, H, M, C] that reading the codes of coefficients would give, differentiable in these and in all that
    codes them.

    weights: of the tokens, by which the codes are chosen together; what that moves the coefficients by is passed on as
        a constant.
    """
    if weights_EST is not None:
        with torch.no_grad():
            moved = transform.shaped(coefficients_ESMC, weights_EST) - coefficients_ESMC
        coefficients_ESMC = coefficients_ESMC + moved
    width = transform.widths.repeat_interleave(GROUP, dim=1)
    step = transform.step.repeat_interleave(GROUP, dim=1)
    half = (2.0 ** (width.float() - 1)).to(coefficients_ESMC.dtype)
    scaled = (coefficients_ESMC - transform.offset) / step
    inside = torch.maximum(torch.minimum(scaled, half - 0.5), 0.5 - half)
    rounded = torch.maximum(torch.minimum(scaled.floor(), half - 1), -half) + 0.5
    passed = inside + (rounded - inside).detach()
    rows = torch.where(width > 0, passed * step, 0.0) + transform.offset
    return rows[:, :, None].expand(-1, -1, transform.heads, -1, -1).flatten(1, 2)

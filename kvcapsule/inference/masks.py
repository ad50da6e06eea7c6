"""Reading attention masks: which tokens are padding, and which tokens a query sees."""

from collections.abc import Mapping
from typing import Any

import torch

from ..vlm.spans import VisualSpan


def valid_tokens(mask: Any, batch: int, new: int) -> torch.Tensor | None:
    """Which of a forward's tokens are not padding, [batch, new] bool, from a mask of any form that models take.

    None: no padding.

    Raises:
        NotImplementedError: for a mask that padding cannot be read from.
    """
    mask = full_attention_mask(mask)
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise NotImplementedError(
            f"padding cannot be read from a mask of the type {type(mask).__name__}: pass the mask [batch, tokens] of"
            ' ones and zeros, and for a CapsuleCache with tail_capacity choose model.set_attn_implementation("sdpa") or'
            ' "eager", before attaching.'
        )
    # One mask may stand for all rows.
    valid: torch.Tensor = _present(mask)[:, -new:].expand(batch, -1)
    return valid


def without_hidden(spans: list[VisualSpan], valid: torch.Tensor | None) -> list[VisualSpan]:
    """The visual spans of which no token is hidden; the tokens of others that are seen are stored as text is.

    Args:
        spans: of a forward.
        valid: [B, N] bool: False at tokens that its mask hides; None: none.
    """
    if valid is None or not spans or bool(valid.all()):
        return spans
    return [span for span in spans if bool(valid[span.row, span.start : span.start + span.length].all())]


def tokens_before(mask: Any, batch: int, new: int, past: int) -> list[int]:
    """How many tokens each row has before a forward's `new` ones, padding not counted.

    Args:
        mask: of the forward, in any form that models take. Where it does not reach back over all `past` tokens (the
            four-dimensional masks of a static tail), their padding is not known and counts.
        batch: number of rows.
        new: tokens of the forward.
        past: tokens that the cache has been given, padding included.
    """
    mask = full_attention_mask(mask)
    if not isinstance(mask, torch.Tensor) or mask.shape[-1] != past + new:
        return [past] * batch
    counts: list[int] = _present(mask)[:, :past].sum(1).expand(batch).tolist()
    return counts


def full_attention_mask(mask: Any) -> Any:
    """One mask of those for each kind of layer: of layers with full attention, the last query sees every token but
    padding."""
    return mask.get("full_attention") if isinstance(mask, Mapping) else mask


def present_in(mask: torch.Tensor) -> torch.Tensor:
    """[B or 1, Q or 1, N] bool: what each query sees, of a mask with two dimensions or four; one query where a mask of
    two dimensions tells of all."""
    if mask.dim() == 4:
        mask = mask[:, 0]
        return mask if mask.dtype == torch.bool else mask == 0
    return mask.bool()[:, None]


def _present(mask: torch.Tensor) -> torch.Tensor:
    """[B or 1, N] bool: False at padding: the last query sees every token but that."""
    return present_in(mask)[:, -1]


def visible_new_tokens(mask: torch.Tensor | None, new: int, device: torch.device) -> torch.Tensor:
    """Which of the forward's own `new` tokens each of its queries sees, [B or 1, Q, new] bool; mask None: causal."""
    return torch.ones(new, new, dtype=torch.bool, device=device).tril()[None] if mask is None else mask[:, 0, :, -new:]


def present_tokens(mask: torch.Tensor | None, batch: int, count: int) -> torch.Tensor | None:
    """Which of the first `count` tokens under a forward's mask are not padding, [batch, count] bool; None: all.

    Args:
        mask: [B or 1, 1, Q, N] bool; None: no padding.
    """
    if mask is None:
        return None
    # The last query sees every token but padding.
    present = mask[:, 0, -1, :count].expand(batch, -1)
    return None if bool(present.all()) else present.clone()

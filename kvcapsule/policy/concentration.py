"""How much of a head's attention lies on few tokens."""

import torch

from ..methods.layer_prefill import LayerPrefill

_CHUNK = 256
"""Queries whose attention is computed at once."""


def concentration(prefill: LayerPrefill, top: float) -> torch.Tensor:
    """[B, H, G]: for each query head the attention on a text query's ceil(top * n) most attended of n visible tokens, a
    mean over queries.

    Exact causal softmax, a chunk of text queries at a time. 0 for a row without text: nothing then says that a head is
    focused.
    """
    batch, heads, tokens, dim = prefill.keys.shape
    work = torch.promote_types(prefill.keys.dtype, torch.float32)
    keys = prefill.keys.to(work)[:, :, None].transpose(-1, -2)
    text = prefill.valid & ~prefill.visual()
    counts, visible = text.sum(dim=1), prefill.valid.cumsum(dim=1)
    positions = torch.arange(tokens, device=keys.device)
    order = torch.sort((~text).to(torch.int8), dim=1, stable=True).indices[:, : max(1, int(counts.max()))]
    mass = torch.zeros(batch, heads, prefill.query.shape[1] // heads, dtype=work, device=keys.device)
    for at in order.split(_CHUNK, dim=1):
        query = prefill.query.gather(2, at[:, None, :, None].expand(-1, prefill.query.shape[1], -1, dim))
        seen = prefill.valid[:, None] & (positions <= at[..., None])
        logits = (query.unflatten(1, (heads, -1)).to(work) @ keys) * prefill.scale
        attention = logits.masked_fill(~seen[:, None, None], torch.finfo(work).min).softmax(dim=-1)
        # A product that is whole but for the last bit of a double is whole.
        most = (top * visible.gather(1, at).double() - 1e-6).ceil().clamp_min(1)
        best = attention.topk(int(most.max()), dim=-1).values
        counted = torch.arange(best.shape[-1], device=keys.device) < most[..., None]
        asked = counted & text.gather(1, at)[..., None]
        mass += (best * asked[:, None, None]).sum(dim=(3, 4))
    return mass / counts.clamp_min(1)[:, None, None]

"""The learned selector of compact codecs: a network that ranks a tile's tokens, of which the first are kept."""

import torch
import torch.nn.functional as F
from torch import nn

from .checked_tensors import CheckedTensors, check_positive


class TokenSelector(nn.Module, CheckedTensors):
    """Ranks a tile's tokens by a two-layer network over a token's key and value with a position embedding, per KV head.

    Its parameters are zero until it is trained (kvcapsule.training.families.token_selector).
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads, 2 * dim))
        self.register_buffer("spread", torch.ones(heads, 2 * dim))
        self.inner = nn.Parameter(torch.zeros(heads, 2 * dim, hidden))
        self.place = nn.Parameter(torch.zeros(heads, tile, hidden))
        self.outer = nn.Parameter(torch.zeros(heads, hidden, 1))
        self.place_bias = nn.Parameter(torch.zeros(heads, tile))

    def check_tensors(self) -> None:
        check_positive("spread", self.spread)

    def forward(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
        """Ranking of the tokens, [E, H, T], higher for tokens to keep."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        mean, spread, inner, place, outer, place_bias = (
            p.to(work) for p in (self.mean, self.spread, self.inner, self.place, self.outer, self.place_bias)
        )
        token = (torch.cat([k_EHTD, v_EHTD], dim=-1).to(work) - mean[:, None]) / spread[:, None]
        return (F.gelu(token @ inner + place) @ outer)[..., 0] + place_bias

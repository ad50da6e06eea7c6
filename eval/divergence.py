"""How far a method's next-token distribution is from the full cache's."""

import torch


def divergence(full_BV: torch.Tensor, method_BV: torch.Tensor) -> torch.Tensor:
    """KL(full || method) in nats of each row's next-token distribution, from logits [B, V]: [B], in float64."""
    full, method = full_BV.double().log_softmax(-1), method_BV.double().log_softmax(-1)
    # A token of probability 0 with the full cache adds nothing; 0 * -inf would make it NaN.
    terms = torch.where(full == -torch.inf, 0.0, full.exp() * (full - method))
    return terms.sum(-1).clamp_min(0.0)

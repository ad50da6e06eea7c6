"""Products of all entries with a map that they share."""

import torch


def times_map(x_EHTM: torch.Tensor, map_HMN: torch.Tensor) -> torch.Tensor:
    """Products [E, H, T, N] of all entries with a map that they share: one product a head, where a broadcast one would
    copy the map for every entry."""
    product: torch.Tensor = x_EHTM.transpose(0, 1).flatten(1, 2) @ map_HMN
    entries: torch.Tensor = product.unflatten(1, (x_EHTM.shape[0], -1))
    return entries.transpose(0, 1)

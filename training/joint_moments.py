"""Second moments of several parts side by side, such as the keys and the values of a layer group.

A part's own moments are blocks of them, and so are those in any coordinates of the parts. Sums are fp64: a mean that is
large beside what varies about it would be all that is left of fp32 ones.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .second_moments import Moments


class JointMoments(nn.Module):
    """Sums over tiles of P parts, T tokens and W channels each, by head group: X, and X^T X over the channels of all
    parts; X X^T of each part. Adding up the buffers of several ranks gives those of all data."""

    total: torch.Tensor
    tokens: torch.Tensor
    channels: torch.Tensor
    count: torch.Tensor

    def __init__(self, parts: int, head_groups: int, tile: int, width: int) -> None:
        super().__init__()
        self.parts, self.width = parts, width
        self.register_buffer("total", torch.zeros(head_groups, tile, parts * width, dtype=torch.float64))
        self.register_buffer("tokens", torch.zeros(parts, head_groups, tile, tile, dtype=torch.float64))
        # Of the blocks of two parts only those on the diagonal and to its right.
        self.register_buffer("channels", torch.zeros(head_groups, parts * width, parts * width, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def add(self, parts: Sequence[torch.Tensor]) -> None:
        """Take in tiles [E, S, T, W] of each part. One head group's numbers are held in fp64 at a time."""
        width = self.width
        for group in range(self.total.shape[0]):
            rows_ETC = torch.cat([x[:, group] for x in parts], dim=2).double()
            self.total[group] += rows_ETC.sum(0)
            rows = rows_ETC.flatten(0, 1)
            for part in range(self.parts):
                first = part * width
                part_rows = rows[:, first : first + width]
                self.channels[group, first : first + width, first:].addmm_(part_rows.transpose(0, 1), rows[:, first:])
                along = rows_ETC[..., first : first + width].transpose(0, 1).flatten(1)
                self.tokens[part, group].addmm_(along, along.transpose(0, 1))
        self.count += len(parts[0])

    def part(self, index: int) -> Moments:
        """The moments of one part alone."""
        columns = slice(index * self.width, (index + 1) * self.width)
        return _moments(self.total[:, :, columns], self.tokens[index], self.channels[:, columns, columns], self.count)

    def mapped(self, into_PSWW: torch.Tensor, tokens_STT: torch.Tensor) -> Moments:
        """The moments of all parts side by side, in coordinates y = x into of each part.

        tokens: X X^T in those coordinates, which does not follow from the sums.
        """
        total = self.total.unflatten(2, (self.parts, self.width))
        total = torch.einsum("stpw,pswv->stpv", total, into_PSWW.double()).flatten(2)
        channels = torch.zeros_like(self.channels)
        for i in range(self.parts):
            for j in range(i, self.parts):
                rows, columns = (slice(k * self.width, (k + 1) * self.width) for k in (i, j))
                block = into_PSWW[i].double().transpose(-1, -2) @ self.channels[:, rows, columns]
                block = block @ into_PSWW[j].double()
                channels[:, rows, columns] = block
                channels[:, columns, rows] = block.transpose(-1, -2)
        return _moments(total, tokens_STT, channels, self.count)


def _moments(total: torch.Tensor, tokens: torch.Tensor, channels: torch.Tensor, count: torch.Tensor) -> Moments:
    # Made without memory of their own: the sums are those given.
    with torch.device("meta"):
        moments = Moments(*total.shape)
    moments.total, moments.tokens, moments.channels, moments.count = total, tokens, channels, count
    return moments

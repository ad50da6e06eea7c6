"""Mean axes: axes of a transform code that have no bits and hold the mean tile.

A code gives the mean tile back along its own axes, which takes parameters and not a byte of any tile. Along the axes
that it leaves out the mean is lost, and in every tile alike: the axes are those of the variance, so a channel that is
the same in all tiles, such as the bias of a key, is the first to be left out, however large it is.

The axes without bits may be rotated among themselves: nothing that is coded changes. Rotated to the singular vectors of
the mean tile's part there, few of them hold most of it, and those the code keeps.
"""

from typing import NamedTuple

import torch

from kvcapsule.codec.bit_allocation import distortion
from kvcapsule.segments.bit_packing import GROUP

from ..second_moments import Bases

LOST = 0.05
"""Most energy of the mean tile that is lost along channels, and as much along tokens, relative to the squared error
that the code is expected to make."""


class Held(NamedTuple):
    """What a code keeps of a source."""

    bases: Bases
    """With the axes that have no bits rotated."""
    mean: torch.Tensor
    """[S, T, W]: of the coefficients in them."""
    rows: int
    """A multiple of 8."""
    channels: int


def used(widths: torch.Tensor) -> tuple[int, int]:
    """Rows (a multiple of 8) and channels up to the last that has bits in widths [S, G, W]; at least one cell of
    them."""
    coded = (widths > 0).any(0)
    groups, channels = (int(coded.any(axis).nonzero().amax()) + 1 if coded.any() else 1 for axis in (1, 0))
    return groups * GROUP, channels


def with_means(
    bases: Bases, mean_STW: torch.Tensor, cells: torch.Tensor, widths: torch.Tensor, most: int | None = None
) -> Held:
    """Rows and channels that have bits, and those that the mean tile needs beside them.

    Args:
        bases: of the source.
        mean_STW: of its coefficients.
        cells: [S, G, W], their variance by cells.
        widths: [S, G, W], bits of the cells.
        most: channels at most; None sets no bound.
    """
    rows, channels = used(widths)
    tile = mean_STW.shape[1]
    bound = LOST * float((cells.cpu() * distortion(widths)).sum())
    rotation, left = _rotation(mean_STW[:, :, channels:])
    more = int((left > bound).sum())
    channels_in, channels_out = (
        torch.cat([x[:, :, :channels], x[:, :, channels:] @ rotation.to(x)], 2) for x in bases[1:]
    )
    mean = torch.cat([mean_STW[:, :, :channels], mean_STW[:, :, channels:] @ rotation], 2)
    channels = max(channels, min(channels + more, mean.shape[2] if most is None else most))
    tokens = bases.tokens
    if rows < tile:
        rotation, left = _rotation(mean[:, rows:, :channels].transpose(1, 2))
        more = int((left > bound).sum())
        rotated = rotation.transpose(1, 2)
        tokens = torch.cat([tokens[:, :rows], rotated.to(tokens) @ tokens[:, rows:]], 1)
        mean = torch.cat([mean[:, :rows], rotated @ mean[:, rows:]], 1)
        rows += -(-more // GROUP) * GROUP
    return Held(Bases(tokens, channels_in, channels_out), mean, rows, channels)


def _rotation(lost_SNK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthogonal map [S, K, K] to the singular vectors of what is lost, the greatest first, and the energy [K] that
    is lost without any of them, without the second and the further ones, and so on."""
    if not lost_SNK.shape[2]:
        return lost_SNK.new_zeros(len(lost_SNK), 0, 0), lost_SNK.new_zeros(0)
    values, vectors = torch.linalg.eigh(lost_SNK.transpose(1, 2) @ lost_SNK)
    energy = values.clamp_min(0).sum(0)
    return vectors.flip(-1), energy.cumsum(0).flip(0).cpu()

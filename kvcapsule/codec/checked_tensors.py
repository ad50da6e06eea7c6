"""Modules that refuse numbers with which they would fail, or answer nonsense, at their first use."""

import torch

from ..errors import ConfigError
from ..segments.bit_packing import WIDTHS


class CheckedTensors:
    """Mixin of modules whose tensors must be more than finite. Loading a capsule calls `check_tensors`."""

    def check_tensors(self) -> None:
        """Raises ConfigError that begins with the name of the tensor which cannot be used."""
        raise NotImplementedError


def check_places(name: str, places: torch.Tensor, tile: int) -> None:
    """Raises ConfigError unless `places` [m] are tokens of a tile, ascending, none twice."""
    if bool((places < 0).any() | (places >= tile).any()) or bool((places.diff() <= 0).any()):
        raise ConfigError(f"{name} must be ascending places in a tile of {tile} tokens, from 0 to {tile - 1}.")


def check_widths(name: str, widths: torch.Tensor) -> None:
    """Raises ConfigError unless every cell has a width that can be packed, or 0."""
    if wrong := sorted(set(widths.unique().tolist()) - {0, *WIDTHS}):
        raise ConfigError(
            f"{name} has cells of {', '.join(map(str, wrong[:8]))} bits: a cell has 0, {', '.join(map(str, WIDTHS))}"
            " bits."
        )


def check_positive(name: str, numbers: torch.Tensor) -> None:
    """Raises ConfigError unless all numbers are above 0."""
    if not bool((numbers > 0).all()):
        raise ConfigError(f"{name} must be above 0 everywhere.")

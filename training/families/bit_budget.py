"""Bytes that the codes of one tile may take, and their split over cells within a limit of decoder maps."""

from collections.abc import Callable, Sequence

import torch

from kvcapsule.codec.bit_allocation import WIDEST, allocate
from kvcapsule.errors import ConfigError
from kvcapsule.vlm.geometry import KVGeometry

from .map_budget import default_limit, most_channels


class BitBudget:
    """Bits of a model's codes at given bits an element."""

    def __init__(
        self,
        geometry: KVGeometry,
        tile: int,
        element_bits: float,
        *,
        framed: bool,
        max_map_mib: float | None,
        show: Callable[[str], None],
    ) -> None:
        """A budget for all layers.

        Args:
            geometry: of the model.
            tile: visual tokens of a tile.
            element_bits: mean bits of an element of the keys and values, all that a tile stores included.
            framed: whether a tile stores a rotary frame.
            max_map_mib: upper limit of all decoder maps in MiB; 0 for none, None for the default.
            show: prints a line to the user.
        """
        self.geometry, self.tile, self.element_bits = geometry, tile, element_bits
        self.framed, self.max_map_mib, self.show = framed, max_map_mib, show

    def elements(self, parts: int) -> int:
        """Elements of one tile in so many parts (the keys or the values of a layer)."""
        return parts * self.tile * self.geometry.kv_heads * self.geometry.head_dim

    def code_bytes(self, parts: int) -> int:
        """Bytes of one tile's codes in so many parts.

        Raises:
            ConfigError: if they do not come to one for each.
        """
        stored = self.element_bits * self.elements(parts) / 8
        # Its owner and, where it has one, its frame; stored once for all layers.
        overhead = 8 + (self.geometry.head_dim * 4 if self.framed else 0)
        if stored - overhead < parts:
            raise ConfigError(
                f"{self.element_bits:.3g} bit an element are {stored:.0f} bytes a tile, of which"
                f" {float(overhead):.0f} are its address and frame: store more (--bits, --compression) or take a larger"
                " --codec.tile."
            )
        return int(stored - overhead)

    def channel_limits(self, widths: Sequence[torch.Tensor]) -> list[int | None]:
        """Most channels of each source of a model within the limit of decoder maps that was asked for; None sets no
        bound.

        widths: of the cells [S, G, W] of all sources.
        """
        if not self.max_map_mib:
            return [None] * len(widths)
        return [*most_channels(self.max_map_mib, [(len(w), w.shape[2]) for w in widths], self.tile)]

    def allocate(self, costs: list[torch.Tensor], code_bytes: int) -> list[torch.Tensor]:
        """Bits of cells [S, G, W] of sources; none for the last channels, which matter least, where maps would exceed
        their limit.

        A default limit that leaves bits unused is not applied; one that was asked for is, and then the user is told.

        Args:
            costs: of leaving each cell out, source by source.
            code_bytes: of all of them for one tile.
        """
        geometry, wanted = self.geometry, self.max_map_mib
        sources = [(len(c), c.shape[2]) for c in costs]
        channels = len(geometry.capsule_layers) * geometry.kv_heads * geometry.head_dim
        # The share of these sources in the maps of all.
        part = sum(len(c) * c.shape[2] for c in costs) / (2 * channels)
        limit = default_limit(channels, sources, self.tile) if wanted is None else wanted
        most = most_channels(limit * part, sources, self.tile)
        widths = allocate(
            [c * (torch.arange(c.shape[2], device=c.device) < n) for c, n in zip(costs, most, strict=True)], code_bytes
        )
        spent = sum(int(w.long().sum()) for w in widths)
        cut = any(n < width for n, (_, width) in zip(most, sources, strict=True))
        if cut and spent < code_bytes - WIDEST:
            if wanted is None:
                return allocate(costs, code_bytes)
            self.show(
                f"--transform.max-map-mib {wanted} leaves {code_bytes - spent} of {code_bytes} bytes of codes a tile"
                " unused."
            )
        return widths

"""PyramidKV (arXiv 2406.02069): SnapKV's ranking, with budgets that fall linearly from the first layer to the last."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..errors import ConfigError
from ..methods.layer_prefill import LayerPrefill
from ..methods.method import Compressed, CompressionPass
from .snapkv import SnapKV


def pyramid_counts(total: int, layers: int, length: int, beta: float) -> tuple[int, ...]:
    """Kept tokens, layer by layer: whole numbers along a line, `total` in all.

    With mean m = total / layers the last layer keeps m / beta tokens, one at least, and the first 2 m less that; where
    this is more than there are, the first keeps all and the line is flatter (as in the authors' code).
    """
    mean = total / layers
    greatest = min(2 * mean - max(1.0, mean / beta), float(length))
    least = 2 * mean - greatest
    counts, below, exact = [], 0, 0.0
    for layer in range(layers):
        exact += greatest + (least - greatest) * layer / (layers - 1) if layers > 1 else mean
        # Rounded as a running sum, so that what whole tokens take from one layer goes to the next.
        counts.append(round(exact + 1e-9) - below)
        below += counts[-1]
    return tuple(counts)


@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV's score; layer l of L keeps, of a span of T tokens, its share of a line whose mean over the layers is r T.

    beta 20 is the default of the authors' code, where the last layer keeps 1 / beta of the mean; window and pooling are
    SnapKV's here. The line goes through the layers that the cache compresses, those with full attention.
    """

    independent_layers = False

    beta: float = 20.0
    """Mean budget / budget of the last layer; 1 is SnapKV."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ConfigError(f"beta {self.beta} is below 1: the last layer would keep more than the first.")

    def begin_pass(self, layers: Sequence[int]) -> CompressionPass:
        return _LinePass(self, layers)

    def of_layer(self, place: int, layers: int) -> SnapKV:
        """What layer `place` of `layers` does by itself."""
        return _LineLayer(**asdict(self), place=place, layers=layers)


@dataclass(frozen=True, kw_only=True)
class _LineLayer(PyramidKV):
    """One layer of the line."""

    place: int
    layers: int

    def count(self, length: int) -> int:
        total = max(self.layers, round(self.retention * self.layers * length))
        return pyramid_counts(total, self.layers, length, self.beta)[self.place]


class _LinePass:
    """Layers by their place on the line: the model may have others between them."""

    def __init__(self, policy: PyramidKV, layers: Sequence[int]) -> None:
        self.policies = {layer: policy.of_layer(place, len(layers)) for place, layer in enumerate(layers)}

    def add(self, prefill: LayerPrefill) -> Sequence[tuple[int, Compressed]]:
        return [(prefill.layer, self.policies[prefill.layer].compress(prefill))]

"""PyramidKV (arXiv 2406.02069): SnapKV's ranking, with budgets that fall linearly from the first layer to the last."""

from ..geometry import GeometryError, KVGeometry
from .snapkv import SnapKV


def pyramid_counts(total: int, layers: int, length: int, beta: float) -> tuple[int, ...]:
    """Kept tokens, layer by layer: whole numbers along a line, `total` in all.

    With mean m = total / layers the last layer keeps m / beta tokens, one at least, and the first 2 m less that; where this is more than
    there are, the first keeps all and the line is flatter (as in the authors' code).
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


class PyramidKV(SnapKV):
    """SnapKV's score; layer l of L keeps, of a span of T tokens, its share of a line whose mean over the layers is r T.

    beta 20 is the default of the authors' code, where the last layer keeps 1 / beta of the mean; window and pooling are SnapKV's here. All
    layers of the model share the line, also those without full attention (if it has such), whose share is then not used.
    """

    def __init__(
        self, ratio: float, layers: int | None = None, beta: float = 20.0, window: int = 32, kernel: int = 7, pooling: str = "avg"
    ) -> None:
        """Raises ValueError for what SnapKV refuses, no layer, or a beta below 1.

        Args:
            ratio: kept visual tokens / visual tokens, the mean over the layers.
            layers: of the model; None: learned from the model as the policy is attached to it.
            beta: mean budget / budget of the last layer; 1 is SnapKV.
            window: see SnapKV.
            kernel: see SnapKV.
            pooling: see SnapKV.
        """
        super().__init__(ratio, window, kernel, pooling)
        if layers is not None and layers < 1:
            raise ValueError(f"layers {layers}: a model has at least one.")
        if beta < 1:
            raise ValueError(f"beta {beta} is below 1: the last layer would keep more than the first.")
        self.given, self.beta = layers, beta
        self.layers = layers

    def require_geometry(self, geometry: KVGeometry) -> None:
        """Takes the number of layers from the model; raises GeometryError if another one was given."""
        if self.given not in (None, geometry.layers):
            raise GeometryError(f"this PyramidKV spreads its budget over {self.given} layers, but the model has {geometry.layers}.")
        self.layers = geometry.layers

    def count(self, layer: int, length: int) -> int:
        if self.layers is None:
            raise RuntimeError(
                "PyramidKV does not know the number of layers: give `layers`, or use `with kvcapsule.attach(model, policy):`."
            )
        total = max(self.layers, round(self.ratio * self.layers * length))
        return pyramid_counts(total, self.layers, length, self.beta)[layer]

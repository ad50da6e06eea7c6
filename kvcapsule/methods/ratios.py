"""Shares of tokens: checked, as whole tokens of a tile, and divided among layers or heads."""

from collections.abc import Sequence
from math import ceil

from ..errors import ConfigError


def check_ratio(ratio: float, name: str = "retention ratio") -> None:
    """Raises ConfigError for a share outside (0, 1]."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"{name} {ratio} is outside (0, 1]: it is stored tokens / visual tokens, 1 keeps all.")


def check_budget(budget: float) -> None:
    """Raises ConfigError for a share of all prompt tokens outside (0, 1]."""
    if not 0 < budget <= 1:
        raise ConfigError(f"budget {budget} is outside (0, 1]: it is kept tokens / prompt tokens, 1 keeps all.")


def retained(ratio: float, tile: int) -> int:
    """Tokens that a retention ratio keeps of a tile, m = ceil(r T), at least 1."""
    return max(1, ceil(round(ratio * tile, 6)))


def proportional(weights: Sequence[float], total: float, least: float, most: float) -> list[float]:
    """Numbers in proportion to `weights`, each from `least` to `most`, whose sum is `total`, or as near as these allow.

    What a number cannot take beyond its bounds goes to the others in proportion to their weights. A number without
    weight grows once all others are at `most`; weights that are all 0 count as equal.
    """
    count = len(weights)
    if total <= least * count:
        return [least] * count
    if total >= most * count:
        return [most] * count
    smallest = 1e-9 * max(weights) or 1.0
    weights = [max(weight, smallest) for weight in weights]
    numbers = [0.0] * count
    free, left = set(range(count)), total
    while free:
        scale = left / sum(weights[i] for i in free)
        wanted = {i: scale * weights[i] for i in free}
        clipped = {i: min(most, max(least, number)) for i, number in wanted.items()}
        # Only bounds on the side that outweighs the other are final: fixing them moves the scale away from the rest.
        excess = sum(clipped.values()) - left
        fixed = {i for i in free if (clipped[i] > wanted[i] and excess > 0) or (clipped[i] < wanted[i] and excess < 0)}
        for i in fixed or free:
            numbers[i] = clipped[i]
            left -= clipped[i]
        free -= fixed or set(free)
    return numbers


def weighted(mean: float, weights: Sequence[float]) -> tuple[float, ...]:
    """Retention ratios in proportion to one weight a layer, with the given mean; what a layer cannot use (past 1) goes
    to the others.

    Raises:
        ConfigError: for a mean outside (0, 1] or weights that are not all positive.
    """
    check_ratio(mean)
    if not weights or min(weights) <= 0:
        raise ConfigError(f"layer weights {list(weights)}: one positive number for each layer is needed.")
    return tuple(proportional(weights, mean * len(weights), 0.0, 1.0))


def pyramid(mean: float, layers: int, slope: float) -> tuple[float, ...]:
    """Retention ratios that fall linearly from mean (1 + slope) in the first layer to mean (1 - slope) in the last.

    KVCapsule's paper says that earlier layers keep more and gives no numbers; a line is the plainest reading. Where the
    first layers would pass 1, the slope is reduced so that the mean holds.

    Raises:
        ConfigError: for a mean outside (0, 1] or a slope outside [0, 1).
    """
    check_ratio(mean)
    if not 0 <= slope < 1:
        raise ConfigError(
            f"pyramid slope {slope} is outside [0, 1): 0 is uniform, 0.5 keeps thrice as much in the first layer as in"
            " the last."
        )
    slope = min(slope, 1 / mean - 1)
    steps = [1 - 2 * i / (layers - 1) if layers > 1 else 0.0 for i in range(layers)]
    return tuple(mean * (1 + slope * step) for step in steps)

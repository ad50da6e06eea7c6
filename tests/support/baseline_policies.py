"""The baselines of the field as policies, and prefills to try them on."""

from collections.abc import Callable

from kvcapsule.policy import (
    H2O,
    Kivi,
    PyramidKV,
    Random,
    SnapKV,
    StreamingLLM,
    VisualPolicy,
)

LAYERS, HEADS, GROUP, DIM = 4, 2, 2, 8
PRUNING: dict[str, Callable[[float], VisualPolicy]] = {
    "random": Random,
    "streaming-llm": StreamingLLM,
    "snapkv": lambda ratio: SnapKV(ratio, window=6),
    "snapkv-max": lambda ratio: SnapKV(ratio, window=6, pooling="max"),
    "h2o": H2O,
    "pyramidkv": lambda ratio: PyramidKV(ratio).of_layer(0, LAYERS),
}
KIVI: dict[str, Callable[[], VisualPolicy]] = {f"kivi{bits}": lambda bits=bits: Kivi(bits) for bits in (2, 4, 8)}
ALL: dict[str, Callable[[], VisualPolicy]] = {
    **{name: lambda make=make: make(0.3) for name, make in PRUNING.items()},
    **KIVI,
}

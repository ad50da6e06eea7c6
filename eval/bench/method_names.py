"""The methods that are timed, by name; kvcapsule.eval.bench.random_methods builds them."""

SHARES = {
    "full-segments": 1.0,
    "fp8": 0.55,
    "int8": 0.55,
    "int4": 0.3,
    "int2": 0.2,
    "turboquant4": 0.3,
    "kvcapsule-r0.4": 0.45,
    "kept-10%": 0.15,
    "compact-10%": 0.15,
    "coded-compact-10%": 0.05,
    "transform-20x": 0.15,
}
"""Upper limits of the share of the full cache's bytes at 16 bits an element."""
COMPACT = {"compact-10%", "coded-compact-10%"}
"""Those that encode with a query bank."""
METHODS = tuple(SHARES)
"""The methods that are timed against the full cache."""

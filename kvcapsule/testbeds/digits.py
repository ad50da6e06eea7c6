"""Scanned handwritten digits (the UCI set in scikit-learn: 1,797 greyscale scans of 8x8), split into disjoint train,
validation and test scans."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

SPLITS = ("train", "validation", "test")
_SPLIT_SEED = 20_260_516
_FRACTIONS = {"validation": 0.1, "test": 0.2}


@cache
def digit_scans(split: str) -> tuple[tuple[NDArray[np.float32], ...], ...]:
    """Scans of one split, by digit.

    Returns: ten tuples of arrays [8, 8] in 0..1 (1 is ink). Splits share no scan.

    Raises:
        ConfigError: for an unknown split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    scans = (bunch.images / 16.0).astype(np.float32)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(scans))
    n_test = int(len(scans) * _FRACTIONS["test"])
    n_validation = int(len(scans) * _FRACTIONS["validation"])
    bounds = {
        "test": (0, n_test),
        "validation": (n_test, n_test + n_validation),
        "train": (n_test + n_validation, None),
    }
    chosen = order[slice(*bounds[split])]
    return tuple(tuple(scans[i] for i in chosen if bunch.target[i] == digit) for digit in range(10))

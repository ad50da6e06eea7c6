"""The rows that a capsule was trained on, as digests in a file of its folder, so that an evaluation can tell whether it
asks what was learned."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import CapsuleError

ROWS_FILE = "training_rows.safetensors"
MOST = 100_000
"""Digests in a file; 800 kB."""
_MOST_BYTES = 8 * (MOST + 1) + 4096
"""Digests and header."""
_METADATA = {"format": "kvcapsule-training-rows-1"}
_DIGESTS, _TOTAL = "digests", "total"


class TrainingRows(NamedTuple):
    """Digests (kvcapsule.data.row_digest) of the rows that a capsule was trained on."""

    digests: NDArray[np.int64]
    """[n], ascending; of more than MOST rows the lowest MOST, which are as good as drawn at random."""
    total: int
    """How many rows there were."""

    @classmethod
    def of(cls, digests: Iterable[int]) -> "TrainingRows":
        distinct = np.unique(np.fromiter(digests, dtype=np.int64))
        return cls(distinct[:MOST], len(distinct))

    def seen(self, digests: Iterable[int]) -> "Seen":
        """How many of these rows are among the training rows."""
        rows = np.fromiter(digests, dtype=np.int64)
        if self.total > len(self.digests):
            # Above the highest digest that was kept nothing is known.
            rows = rows[rows <= self.digests[-1]]
        return Seen(int(np.isin(rows, self.digests).sum()), len(rows))

    def to_bytes(self) -> bytes:
        tensors = {_DIGESTS: self.digests, _TOTAL: np.array([self.total], dtype=np.int64)}
        return save(tensors, _METADATA)

    @classmethod
    def in_folder(cls, folder: Path) -> "TrainingRows | None":
        """The training rows of the capsule in `folder`; None where they are not recorded.

        Raises:
            CapsuleError: if the file is damaged or of another format version.
        """
        path = folder / ROWS_FILE
        if not path.is_file():
            return None
        again = "Copy or download the capsule again, or delete the file: nothing is known of the training rows then."
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise CapsuleError(
                    f"{path} has {path.stat().st_size:,} bytes, more than {MOST:,} digests have. {again}"
                )
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CapsuleError(f"{path} cannot be read ({error}). {again}") from error
        if metadata != _METADATA:
            raise CapsuleError(f"{path} is not a list of training rows of version 1. {again}")
        if not _are_sound(tensors):
            raise CapsuleError(f"{path} is damaged: its digests are not as many as it says, or not in order. {again}")
        return cls(tensors[_DIGESTS], int(tensors[_TOTAL][0]))


def _are_sound(tensors: dict[str, NDArray[np.int64]]) -> bool:
    if set(tensors) != {_DIGESTS, _TOTAL} or any(t.dtype != np.int64 or t.ndim != 1 for t in tensors.values()):
        return False
    digests, total = tensors[_DIGESTS], tensors[_TOTAL]
    return len(total) == 1 and len(digests) == min(int(total[0]), MOST) and bool((digests[1:] > digests[:-1]).all())


class Seen(NamedTuple):
    """How many rows of an evaluation were trained on."""

    seen: int
    rows: int
    """Those of which it is known whether they were."""

    @property
    def share(self) -> float | None:
        """In [0, 1]; None where nothing is known."""
        return self.seen / self.rows if self.rows else None

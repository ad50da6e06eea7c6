"""Shares of a split, such as train[:80%]: disjoint by the content of the images, whatever the order of the rows.

Rows that have an image in common are of one group. The groups are put in the order of one digest each, of all their
images, which is as good as any random order, and the same in every run; a share is a run of groups.
"""

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..errors import DataError

TRAIN, TEST, ALL = "train", "test", "all"
"""What a source without splits has."""
TRAINED = 90
"""Percent of such a source that are TRAIN."""
_SPLIT = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<start>\d+)?(?P<p>%)?:((?P<stop>\d+)%)?\])?")


class Share(NamedTuple):
    """A split, or a part of one, from and to a percentage of its images."""

    split: str
    start: int = 0
    stop: int = 100

    @property
    def complete(self) -> bool:
        return (self.start, self.stop) == (0, 100)

    def of_unsplit(self, source: str) -> "Share":
        """What it is of a source without splits, which has TRAIN, TEST and ALL.

        Raises:
            DataError: if it is nothing there.
        """
        if self.split in (TRAIN, ALL) and not self.complete:
            return Share(ALL, self.start, self.stop)
        shares = {TRAIN: Share(ALL, 0, TRAINED), TEST: Share(ALL, TRAINED, 100), ALL: Share(ALL)}
        if self.split not in shares or not self.complete:
            raise DataError(
                f"{source} has no split {self.split!r}, as it has no splits: choose {TRAIN} (the first {TRAINED} % of"
                f" its images), {TEST} (the rest), {ALL}, or a share such as train[:80%]."
            )
        return shares[self.split]

    def __str__(self) -> str:
        return f"{self.start} to {self.stop} % of the images, by content"


def parse(split: str) -> Share:
    """A share from its text: train, train[:80%], train[80%:], train[20%:40%].

    Raises:
        DataError: if it is none.
    """
    match = _SPLIT.fullmatch(split)
    if match is None or (match["start"] is None) != (match["p"] is None):
        raise DataError(f"--data.split {split}: give a name, or a share in percent such as train[:80%] or train[80%:].")
    share = Share(match["name"], int(match["start"] or 0), int(match["stop"] or 100))
    if not share.start < share.stop <= 100:
        raise DataError(f"--data.split {split}: the share is empty or ends behind 100 %.")
    return share


def rows_of(share: Share, digests: Sequence[Sequence[str]]) -> list[int]:
    """The rows of a share, in their order.

    Args:
        share: of a split with these rows.
        digests: of every row's images.
    """
    groups = sorted(_groups(digests), key=lambda group: _place({image for row in group for image in digests[row]}))
    start, stop = (_cut(percent, len(groups)) for percent in (share.start, share.stop))
    return sorted(row for group in groups[start:stop] for row in group)


def _place(images: set[str]) -> str:
    """What a group is ordered by: uniform whatever the number of its images. The lowest of their digests would put
    groups of many images first, and the last share would have none of them."""
    if len(images) == 1:
        return next(iter(images))
    return hashlib.blake2b("\n".join(sorted(images)).encode(), digest_size=16).hexdigest()


def _cut(percent: int, groups: int) -> int:
    """Groups before a cut; neither side is empty where there are two groups."""
    if percent in (0, 100) or groups < 2:
        return groups if percent else 0
    return min(max(1, round(percent * groups / 100)), groups - 1)


def _groups(digests: Sequence[Sequence[str]]) -> list[list[int]]:
    """Rows that have an image in common, directly or through others."""
    parents: dict[str, str] = {}

    def root(digest: str) -> str:
        parents.setdefault(digest, digest)
        while parents[digest] != digest:
            parents[digest] = digest = parents[parents[digest]]
        return digest

    for images in digests:
        for digest in images[1:]:
            parents[root(digest)] = root(images[0])
    groups: dict[str, list[int]] = {}
    for row, images in enumerate(digests):
        groups.setdefault(root(images[0]), []).append(row)
    return list(groups.values())

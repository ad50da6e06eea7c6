"""What is counted while an engine runs."""

import pytest

from kvcapsule.serving.stats import Tally, merge


def test_counts_are_taken_once_and_levels_when_they_change() -> None:
    tally = Tally()
    assert tally.take() == {}
    tally.add("images_compressed")
    tally.add("images_compressed", 2)
    tally.level("pool_used_bytes", 5)
    assert tally.take() == {"counts": {"images_compressed": 3}, "levels": {"pool_used_bytes": 5}}
    tally.level("pool_used_bytes", 5)
    assert tally.take() == {}
    tally.level("pool_used_bytes", 0)
    assert tally.take() == {"counts": {}, "levels": {"pool_used_bytes": 0}}


def test_seconds() -> None:
    tally = Tally()
    with tally.seconds("reading_seconds"):
        pass
    assert 0 < tally.take()["counts"]["reading_seconds"] < 1


def test_names_that_nobody_would_see_are_refused() -> None:
    tally = Tally()
    with pytest.raises(KeyError):
        tally.add("pool_used_bytes")
    with pytest.raises(KeyError):
        tally.level("images_compressed", 1)


def test_merge() -> None:
    first = {"counts": {"images_compressed": 2}, "levels": {"pool_used_bytes": 9}}
    second = {"counts": {"images_compressed": 1, "store_hits": 1}, "levels": {"pool_used_bytes": 0}}
    together = {"counts": {"images_compressed": 3, "store_hits": 1}, "levels": {"pool_used_bytes": 0}}
    assert merge(first, second) == together
    assert merge({}, first) == merge(first, {}) == first

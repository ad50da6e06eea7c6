"""Shares of a split: disjoint by content, the same in every order, near the wanted size."""

import random

import pytest

from kvcapsule.data.shares import Share, parse, rows_of
from kvcapsule.errors import DataError


def test_shares_are_disjoint_and_complete() -> None:
    digests = [[f"{hash_of:08x}"] for hash_of in random.Random(0).sample(range(2**32), 100)]
    parts = [rows_of(parse(split), digests) for split in ("train[:80%]", "train[80%:90%]", "train[90%:]")]
    assert [len(part) for part in parts] == [80, 10, 10]
    assert sorted(row for part in parts for row in part) == list(range(100))


def test_rows_with_an_image_in_common_stay_together() -> None:
    """Through others, too: the first three rows are a chain."""
    digests = [["a", "b"], ["b", "c"], ["c"], ["d"], ["e"], ["d"]]
    for percent in (1, 34, 50, 67, 99):
        first, rest = rows_of(Share("all", 0, percent), digests), rows_of(Share("all", percent, 100), digests)
        assert sorted(first + rest) == list(range(6)) and first and rest
        images = [{image for row in part for image in digests[row]} for part in (first, rest)]
        assert not images[0] & images[1]


def test_the_order_of_rows_changes_nothing() -> None:
    digests = [[f"{number:02x}"] for number in random.Random(1).sample(range(256), 40)]
    share = Share("all", 0, 90)
    there = {digests[row][0] for row in rows_of(share, digests)}
    assert there == {digests[::-1][row][0] for row in rows_of(share, digests[::-1])} and len(there) == 36


def test_rows_of_several_images_are_in_every_share_alike() -> None:
    """One share of ten, of rows of which every second has eight images, has about as many of these."""
    names = random.Random(2).sample(range(2**32), 9_000)
    digests = [[f"{name:08x}" for name in names[9 * i : 9 * i + (8 if i % 2 else 1)]] for i in range(1_000)]
    for start in (0, 40, 90):
        several = sum(len(digests[row]) > 1 for row in rows_of(Share("all", start, start + 10), digests))
        assert 30 <= several <= 70


@pytest.mark.parametrize(("groups", "train", "test"), [(1, 1, 0), (2, 1, 1), (4, 3, 1), (10, 9, 1), (30, 27, 3)])
def test_few_images(groups: int, train: int, test: int) -> None:
    digests = [[str(number)] for number in range(groups)]
    assert len(rows_of(Share("all", 0, 90), digests)) == train
    assert len(rows_of(Share("all", 90, 100), digests)) == test


@pytest.mark.parametrize(
    ("split", "share"),
    [
        ("train", Share("train")),
        ("test[20%:40%]", Share("test", 20, 40)),
        ("train[:90%]", Share("train", 0, 90)),
        ("train[90%:]", Share("train", 90, 100)),
        ("a.b-c", Share("a.b-c")),
    ],
)
def test_parsed(split: str, share: Share) -> None:
    assert parse(split) == share


@pytest.mark.parametrize("split", "|train[|train[:]x|train[:10]|train[5:]|train[50%:50%]|train[:101%]|a+b".split("|"))
def test_what_is_no_share_is_refused(split: str) -> None:
    with pytest.raises(DataError, match=r"--data\.split"):
        parse(split)


def test_of_a_source_without_splits() -> None:
    of = {split: parse(split).of_unsplit("a.csv")[1:] for split in ("train", "test", "all", "train[:50%]", "all[50%:]")}
    assert of == {"train": (0, 90), "test": (90, 100), "all": (0, 100), "train[:50%]": (0, 50), "all[50%:]": (50, 100)}
    for split in ("nonsense", "validation", "test[:50%]"):
        with pytest.raises(DataError, match=r"a\.csv has no split .* choose train .the first 90 % .*, test .*, all"):
            parse(split).of_unsplit("a.csv")

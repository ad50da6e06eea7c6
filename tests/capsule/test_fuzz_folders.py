"""Some hundred of the folders that tests/capsule/fuzz_folders.py draws, with a seed of its own."""

from fuzz_folders import LONGEST, fuzz


def test_every_mutated_folder_is_refused_or_works() -> None:
    report = fuzz(250, seed=19)
    assert report.failures == []
    assert report.slowest < LONGEST and report.peak < 2**30
    total = sum((counts for counts in report.outcomes.values()), start=type(report.outcomes["json"])())
    assert total["refused"] > 50 and total["ran"] > 50

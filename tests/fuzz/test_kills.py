"""Some of the kills of tests/fuzz/kills.py, of what takes milliseconds; and what they would see."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from kill_switch import Kill, killed
from kills import SHARES, kill, shared_out

from kvcapsule import atomic_files
from kvcapsule.store.folder import Folder

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def test_killed_saves_and_stores_leave_nothing_half_written() -> None:
    report = kill({"save": 8, "store": 4}, seed=19)
    assert report.failures == []
    assert report.kills == {"save": 8, "store": 4} and len(report.moments) > 3
    assert report.next_runs == {"save": {"saved": 8}, "store": {"stored": 4}}
    assert report.steps["save over one, renamed twice"]["rename"] == 2


def write_in_place(target: Path, contents: Mapping[str, bytes]) -> None:
    target.mkdir(exist_ok=True)
    for name, content in contents.items():
        (target / name).write_bytes(content)


def test_what_is_half_written_or_left_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for changed, said in (
        ({"replace_folder": write_in_place}, ("neither the old capsule", "lacks", "damaged", "empty")),
        ({"remove_litter": lambda target: None}, (".partial",)),
    ):
        with monkeypatch.context() as patch:
            for name, function in changed.items():
                patch.setattr(atomic_files, name, function)
            report = kill({"save": 8}, seed=19)
        assert any(part in failure for failure in report.failures for part in said), changed
    monkeypatch.setattr(Folder, "_remove_litter", lambda self: None)
    assert "left behind" in str(kill({"store": 6}, seed=19).failures)


def test_a_run_is_killed_where_it_was_to_be(tmp_path: Path) -> None:
    def write() -> None:
        for name in "abc":
            (tmp_path / name).write_text(name)

    assert killed(write, Kill(2, 0.0), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not killed(write, Kill(4, 0.0), tmp_path)
    assert not killed(write, Kill(None, 0.5), tmp_path)
    with pytest.raises(AssertionError, match="failed before"):
        killed(lambda: (tmp_path / "no" / "folder").write_text("x"), Kill(9, 0.0), tmp_path)  # type: ignore[func-returns-value]


def test_kills_are_shared_out() -> None:
    counts = shared_out(200, list(SHARES))
    assert sum(counts.values()) == 200 and min(counts.values()) >= 30
    assert shared_out(7, ["train", "eval"]) == {"train": 4, "eval": 3}

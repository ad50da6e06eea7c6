"""The byte store: whole entries or none, a budget, least recently used first to go, in a folder and in memory."""

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from kvcapsule import ImageStore
from kvcapsule.errors import ConfigError
from kvcapsule.store.entry import StoreKey, encode
from kvcapsule.store.folder import LOCK, PARTIAL, SUFFIX

ROOM = 10**6


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | None:
    return tmp_path / "store" if request.param == "folder" else None


def key(name: Any) -> StoreKey:
    return StoreKey.of({"image": name})


def size(name: Any, data: bytes) -> int:
    return len(encode(key(name), data, {}))


def file_of(store: ImageStore, name: Any) -> Path:
    assert store.path is not None
    return store.path / f"{key(name).digest}{SUFFIX}"


def test_what_was_put_is_got(place: Path | None) -> None:
    store = ImageStore(place, max_bytes=ROOM)
    assert store.get(key("a")) is None
    assert store.put(key("a"), b"bytes of a", {"model": "m"}) and store.put(key("b"), b"")
    assert store.get(key("a")) == b"bytes of a" and store.get(key("b")) == b""
    counted = store.statistics
    assert (counted.hits, counted.misses, counted.puts, counted.evictions) == (2, 1, 2, 0)
    assert store.total_bytes() == size("a", b"bytes of a") + len('"model": "m"') + size("b", b"")
    assert store.check() == []


def test_another_store_of_the_folder_gets_it(tmp_path: Path) -> None:
    ImageStore(tmp_path, max_bytes=ROOM).put(key("a"), b"a")
    assert ImageStore(str(tmp_path), max_bytes=0).get(key("a")) == b"a"


def test_an_entry_is_replaced(place: Path | None) -> None:
    store = ImageStore(place, max_bytes=ROOM)
    store.put(key("a"), b"old")
    store.put(key("a"), b"new and longer")
    assert store.get(key("a")) == b"new and longer" and len(store.entries()) == 1


def test_the_least_recently_used_go_first(place: Path | None) -> None:
    data = b"x" * 100
    store = ImageStore(place, max_bytes=3 * size("a", data))
    for name in "abc":
        store.put(key(name), data)
    assert store.get(key("a")) == data
    store.put(key("d"), data)
    assert [store.get(key(name)) is None for name in "abcd"] == [False, True, False, False]
    assert store.statistics.evictions == 1 and store.total_bytes() <= store.max_bytes


def test_several_go_for_a_large_one(place: Path | None) -> None:
    store = ImageStore(place, max_bytes=3 * size("a", b"x" * 100))
    for name in "abc":
        store.put(key(name), b"x" * 100)
    assert store.put(key("large"), b"y" * 400)
    assert [entry.header.key for entry in store.entries() if entry.header] == [key("large")]


def test_what_is_over_the_budget_is_not_stored(place: Path | None, caplog: pytest.LogCaptureFixture) -> None:
    store = ImageStore(place, max_bytes=size("a", b"x" * 100))
    store.put(key("a"), b"x" * 100)
    assert not store.put(key("b"), b"x" * 101) and not store.put(key("c"), b"x" * 101)
    assert store.get(key("a")) is not None, "it went for an entry that was not stored"
    assert store.statistics.refused == 2
    (line,) = caplog.messages
    assert "over the store's" in line


def test_a_budget_of_nothing_stores_nothing(place: Path | None) -> None:
    store = ImageStore(place, max_bytes=0)
    assert not store.put(key("a"), b"") and store.get(key("a")) is None


def test_prune(place: Path | None) -> None:
    data = b"x" * 50
    store = ImageStore(place, max_bytes=ROOM)
    for name in "abcd":
        store.put(key(name), data)
    evicted = store.prune(2 * size("a", data))
    assert evicted == (2, 2 * size("a", data))
    assert [store.get(key(name)) is None for name in "abcd"] == [True, True, False, False]
    assert store.prune(0).entries == 2 and store.total_bytes() == 0


def test_entries_are_listed_with_what_they_are_about(place: Path | None) -> None:
    store = ImageStore(place, max_bytes=ROOM)
    store.put(key("a"), b"a", {"model": "m", "tokens": 196})
    store.put(key("b"), b"b")
    newest, oldest = store.entries()
    assert newest.header is not None and newest.header.key == key("b")
    assert oldest.header is not None and oldest.header.about == {"model": "m", "tokens": 196}
    assert oldest.bytes > oldest.header.bytes == 1 and oldest.last_used <= newest.last_used


def cut(content: bytes) -> bytes:
    return content[:-1]


def grow(content: bytes) -> bytes:
    return content + b"\0"


def flip_data(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def flip_about(content: bytes) -> bytes:
    return content.replace(b"model", b"modem")


def lose_header(content: bytes) -> bytes:
    return content[:40]


def other_version(content: bytes) -> bytes:
    return content.replace(b"store 1", b"store 2")


def empty(content: bytes) -> bytes:
    return b""


def endless_header(content: bytes) -> bytes:
    start = content.index(b"\n") + 33
    return content[:start] + b"\xff" * 8 + content[start + 8 :]


DAMAGES = [cut, grow, flip_data, flip_about, lose_header, other_version, empty, endless_header]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_a_miss_and_goes(damage: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ImageStore(tmp_path, max_bytes=ROOM)
    for name in "ab":
        store.put(key(name), b"data", {"model": "m"})
    file = file_of(store, "a")
    file.write_bytes(damage(file.read_bytes()))
    (found,) = store.check()
    assert found.digest == key("a").digest and file.exists()
    assert store.get(key("a")) is None and not file.exists()
    assert (store.statistics.damaged, store.statistics.misses) == (1, 1)
    assert len(caplog.messages) == 1 and found.reason in caplog.messages[0]
    assert store.get(key("b")) == b"data"


def test_a_check_removes_what_is_damaged(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_bytes=ROOM)
    for name in "ab":
        store.put(key(name), b"data")
    file_of(store, "a").write_bytes(b"noise")
    assert [entry.header is None for entry in store.entries()].count(True) == 1
    assert len(store.check(remove=True)) == 1 and store.check() == []
    assert store.get(key("b")) == b"data"


def test_a_renamed_entry_is_a_miss(tmp_path: Path) -> None:
    store = ImageStore(tmp_path, max_bytes=ROOM)
    store.put(key("a"), b"of a")
    file_of(store, "a").rename(file_of(store, "b"))
    (found,) = store.check()
    assert "another key" in found.reason
    assert store.get(key("b")) is None and store.get(key("a")) is None


def test_equal_digests_of_other_keys_are_a_miss(place: Path | None) -> None:
    store, other = ImageStore(place, max_bytes=ROOM), StoreKey("another description")
    store.put(key("a"), b"of a")
    vars(other)["digest"] = key("a").digest
    assert store.get(other) is None


def test_keys_do_not_depend_on_the_order_of_their_parts() -> None:
    assert StoreKey.of({"a": 1, "b": [2, None]}) == StoreKey.of({"b": [2, None], "a": 1})
    assert StoreKey.of({"a": 1}).digest != StoreKey.of({"a": "1"}).digest


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    others = ["notes.txt", f"short{SUFFIX}", "0" * 64, f".{'0' * 16}.part"]
    for name in others:
        (tmp_path / name).write_bytes(b"x" * 100)
    (tmp_path / f"{'1' * 64}{SUFFIX}").mkdir()
    store = ImageStore(tmp_path, max_bytes=ROOM)
    store.put(key("a"), b"a")
    assert len(store.entries()) == 1 and store.check(remove=True) == []
    store.prune(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, f"{'1' * 64}{SUFFIX}", LOCK])


def test_what_a_killed_writer_left_goes_and_what_is_written_stays(tmp_path: Path) -> None:
    import fcntl

    dead, alive = (tmp_path / f".{'0' * 16}.{name}{PARTIAL}" for name in ("dead", "alive"))
    dead.write_bytes(b"half")
    os.utime(dead, (time.time() - 90,) * 2)
    with alive.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(alive, (0, 0))
        ImageStore(tmp_path, max_bytes=ROOM).put(key("a"), b"a")
        assert alive.exists() and not dead.exists()
    ImageStore(tmp_path, max_bytes=0).prune(ROOM)
    assert not alive.exists()


def test_litter_without_locks_goes_by_its_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcapsule.store.folder.fcntl", None)
    old, new = (tmp_path / f".{'0' * 16}.{name}{PARTIAL}" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (0, 0))
    store = ImageStore(tmp_path, max_bytes=ROOM)
    assert store.put(key("a"), b"a") and store.get(key("a")) == b"a"
    assert new.exists() and not old.exists()


def test_a_lock_that_is_not_given_back_does_not_stop_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("kvcapsule.store.folder._LOCK_SECONDS", 0.02)
    store = ImageStore(tmp_path, max_bytes=ROOM)
    with (tmp_path / LOCK).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert store.put(key("a"), b"a")
    assert store.get(key("a")) == b"a"


@pytest.mark.parametrize("number", [28, 30])
def test_a_full_or_read_only_disk_is_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ImageStore(tmp_path, max_bytes=ROOM)

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    assert not store.put(key("a"), b"a") and not store.put(key("b"), b"b")
    (line,) = caplog.messages
    assert os.strerror(number) in line
    assert store.get(key("a")) is None and store.statistics.refused == 2
    assert [path.name for path in tmp_path.iterdir()] in ([], [LOCK]), "something half written is left"


def test_a_folder_that_vanished_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ImageStore(tmp_path / "store", max_bytes=ROOM)
    (tmp_path / "store").rmdir()
    assert store.get(key("a")) is None and not store.put(key("a"), b"a")
    assert len(caplog.messages) == 1


def test_an_entry_that_cannot_be_read_is_a_miss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = ImageStore(tmp_path, max_bytes=ROOM)
    store.put(key("a"), b"a")

    def refuse(*args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr("kvcapsule.store.image_store.read_entry", refuse)
        assert store.get(key("a")) is None
        assert "cannot be read" in store.check()[0].reason
    assert "Permission denied" in caplog.text
    assert store.get(key("a")) == b"a"


def test_unusable_arguments_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="folder"):
            ImageStore(path, max_bytes=1)
    for budget in (-1, 1.5, True):
        with pytest.raises(ConfigError, match="max_bytes"):
            ImageStore(None, max_bytes=budget)  # type: ignore[arg-type]

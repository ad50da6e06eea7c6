"""`kvcapsule store`: list, check, prune."""

import json
from pathlib import Path

import pytest

from kvcapsule import ImageStore
from kvcapsule.cli import main
from kvcapsule.store.entry import StoreKey
from kvcapsule.store.folder import SUFFIX


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two entries; b is the one most recently used."""
    store = ImageStore(tmp_path / "store", max_bytes=10**6)
    store.put(StoreKey("a"), b"a" * 1000, {"model": "pages-vlm", "capsule": "cap", "grid": [1, 14, 14], "tokens": 196})
    store.put(StoreKey("b"), b"b" * 2000)
    return tmp_path / "store"


def damage(folder: Path, name: str) -> Path:
    file = folder / f"{StoreKey(name).digest}{SUFFIX}"
    file.write_bytes(file.read_bytes()[:-1])
    return file


def test_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", str(folder), "list", "--wide"]) == 0
    head, _, newest, oldest, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["entry", "bytes", "tokens", "grid", "last", "use", "model", "capsule"]
    assert newest.startswith(StoreKey("b").digest[:12])
    assert oldest.split()[2:4] == ["196", "1x14x14"] and oldest.split()[-2:] == ["pages-vlm", "cap"]
    assert total == "2 entries, 3.3 kB"


def test_list_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage(folder, "b").write_bytes(b"noise")
    assert main(["store", str(folder), "list", "--json", "-"]) == 0
    values = {value["entry"]: value for value in json.loads(capsys.readouterr().out)}
    assert values[StoreKey("a").digest]["about"]["tokens"] == 196
    assert values[StoreKey("b").digest] | {"last_used": 0} == {
        "entry": StoreKey("b").digest,
        "bytes": 5,
        "last_used": 0,
        "about": None,
    }


def test_an_empty_folder_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", str(tmp_path), "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 entries, 0 B"


def test_check(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", str(folder), "check"]) == 0
    assert capsys.readouterr().out == "2 entries sound, 0 damaged\n"
    file, report = damage(folder, "a"), tmp_path / "report.json"
    assert main(["store", str(folder), "check", "--json", str(report)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{StoreKey('a').digest}: it has 999 bytes of data where 1,000")
    assert last == "1 entry sound, 1 damaged" and file.exists()
    assert [value["digest"] for value in json.loads(report.read_text())] == [StoreKey("a").digest]
    assert main(["store", str(folder), "check", "--remove"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 entry sound, 1 damaged, removed" and not file.exists()
    assert main(["store", str(folder), "check"]) == 0


def test_prune(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", str(folder), "prune", "--max-bytes", "2.5kB"]) == 0
    assert capsys.readouterr().out == "1 entry removed, 1.2 kB; 2.1 kB left\n"
    assert ImageStore(folder, max_bytes=0).get(StoreKey("b")) is not None
    assert main(["store", str(folder), "prune", "--max-bytes", "0", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "list"], "there is no folder nowhere"),
        ([".", "prune"], "--max-bytes"),
        ([".", "list", "--max-bytes", "1GB"], "--max-bytes"),
        ([".", "prune", "--max-bytes", "1QB"], "'1QB' is no size"),
        ([".", "list", "--remove"], "--remove"),
        ([".", "shrink"], "invalid choice"),
    ],
)
def test_wrong_input_is_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["store", *words])
    except SystemExit as ended:
        code = ended.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2 and not captured.out
    (line,) = captured.err.splitlines()
    assert line.startswith("kvcapsule store: ") and message in line


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("12", 12), ("10GB", 10**10), ("1.5GiB", 3 * 2**29), ("7 kb", 7000), ("2TiB", 2**41), ("3B", 3)],
)
def test_sizes(text: str, count: int) -> None:
    from kvcapsule.cli.sizes import byte_count

    assert byte_count(text) == count

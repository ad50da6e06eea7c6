"""Policies and families of other packages, through the real command: docs/extending.md, block by block, and what goes
wrong."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvcapsule.errors import ConfigError
from kvcapsule.extensions import Registry, Selection

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
_FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```", re.DOTALL)
_COMMANDS = re.compile(r"```bash\n(.*?)```", re.DOTALL)
GROUPS = ("kvcapsule.policies", "kvcapsule.families")


def install(folder: Path, name: str, entries: dict[str, dict[str, str]]) -> None:
    """What pip would write of a package's entry points."""
    info = folder / f"{name.replace('-', '_')}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    lines = [line for group, own in entries.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in own.items()))]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run(words: list[str], folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "kvcapsule", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package that the page makes, installed in a folder."""
    folder = tmp_path_factory.mktemp("site")
    files = dict(_FILE.findall(PAGE.read_text()))
    assert sorted(files) == [
        "kvc_example/codec.py",
        "kvc_example/policy.py",
        "kvc_example/training.py",
        "pyproject.toml",
    ]
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    (folder / "kvc_example").mkdir()
    (folder / "kvc_example" / "__init__.py").touch()
    for name, text in files.items():
        (folder / name).write_text(text)
    assert tuple(project["entry-points"]) == GROUPS
    install(folder, project["name"], project["entry-points"])
    return folder


@pytest.fixture(scope="module")
def trained(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command of the page has run."""
    folder = tmp_path_factory.mktemp("work")
    commands = [line.split() for block in _COMMANDS.findall(PAGE.read_text()) for line in block.splitlines()]
    assert [words[1] for words in commands] == ["eval", "train", "eval"]
    for number, (program, *words) in enumerate(commands):
        assert program == "kvcapsule"
        extra = ["--json", f"{number}.json"] if words[0] == "eval" else ["--device", "cpu"]
        done = run([*words, *extra], folder, package)
        assert done.returncode == 0, done.stderr
    return folder


def test_commands_of_the_page(trained: Path) -> None:
    first, second = (
        {row["method"]: row for row in json.loads((trained / f"{number}.json").read_text())["rows"]}
        for number in (0, 2)
    )
    assert set(first) == {"full", "evenly-spaced", "longest-keys"}
    assert first["longest-keys"]["visual_kv_bytes"] == first["evenly-spaced"]["visual_kv_bytes"]
    assert set(second) == {"full", "strided", "longest-keys"}
    # Half of the tokens, and the owner and frame of each tile.
    assert 1.7 < second["full"]["visual_kv_bytes"] / second["strided"]["visual_kv_bytes"] < 2
    config = json.loads((trained / "runs" / "strided" / "config.json").read_text())
    assert (config["family"], config["metadata"]["package"]) == ("strided", "kvc-example 0.1")
    assert config["codec"]["every"] == 2


def test_methods_lists_them_and_says_what_is_broken(package: Path, tmp_path: Path) -> None:
    install(tmp_path, "kvc-broken", {GROUPS[0]: {"torn": "kvc_broken.policy:Torn"}})
    done = run(["methods"], tmp_path, package, tmp_path)
    assert done.returncode == 0
    assert "longest-keys" in done.stdout and "strided" in done.stdout and "snapkv" in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert "'torn' of the package kvc-broken 0.1 cannot be loaded" in line and "No module named 'kvc_broken'" in line
    done = run(["eval", "--methods", "torn", "--budget", "0.5", "--data.size", "2"], tmp_path, package, tmp_path)
    assert done.returncode == 2 and "kvc-broken 0.1" in done.stderr and "Traceback" not in done.stderr


def test_by_path_without_an_installed_package(package: Path, tmp_path: Path) -> None:
    """PYTHONPATH has the module, and no entry point names it."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "kvc_example").symlink_to(package / "kvc_example")
    words = ["--methods", "kvc_example.policy:LongestKeys", "--budget", "0.5", "--data.size", "2", "--timing", "false"]
    done = run(["eval", *words, "--json", "e.json"], tmp_path, tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "kvc_example.policy:LongestKeys"]
    quick = ["--data.size", "80", "--codec.tile", "28", "--device", "cpu", "--output", "c"]
    done = run(["train", "--family", "kvc_example.codec:FAMILY", *quick], tmp_path, tmp_path / "bare")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "c" / "config.json").read_text())["family"] == "strided"
    assert "can be loaded where an entry point" in done.stderr
    done = run(["train", "--family", "kvc_example.codec:FAMILY", "--optim.lr", "1"], tmp_path, tmp_path / "bare")
    assert done.returncode == 2 and "--optim.lr is an option of the family kvcapsule" in done.stderr


def test_a_capsule_of_a_missing_package_says_which(trained: Path, tmp_path: Path) -> None:
    done = run(["eval", "--capsule", str(trained / "runs" / "strided"), "--data.size", "2"], tmp_path)
    assert done.returncode == 2 and "Install the package kvc-example 0.1" in done.stderr
    assert "Traceback" not in done.stderr


OWN: dict[str, type] = {"one": int, "two": float}


@pytest.fixture
def registry() -> Registry[type]:
    return Registry("number", "kvcapsule.numbers", dict(OWN), "a type", lambda loaded: isinstance(loaded, type))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_names_that_clash_are_refused_with_both_owners(installed: Path, registry: Registry[type]) -> None:
    install(installed, "kvc-a", {registry.group: {"one": "builtins:int", "three": "builtins:str"}})
    install(installed, "kvc-b", {registry.group: {"three": "builtins:bytes", "four": "builtins:len"}})
    with pytest.raises(ConfigError, match=r"'one' is one of kvcapsule and of kvc-a 0\.1"):
        registry.find("one")
    with pytest.raises(ConfigError, match=r"kvc-a 0\.1 \(builtins:str\) and of kvc-b 0\.1|kvc-b.* and of kvc-a"):
        registry.find("three")
    with pytest.raises(ConfigError, match=r"kvc-b 0\.1 is of type builtin_function_or_method, but a type is needed"):
        registry.find("four")
    assert registry.find("two") is float
    assert registry.names() == ["one", "two", "three", "four"]


def test_what_is_not_there_is_refused(registry: Registry[type]) -> None:
    assert registry.find("builtins:str") is str
    for name, says in (
        ("tow", r"there is no number 'tow'; did you mean 'two'\?"),
        ("no.such.module:X", "cannot be imported"),
        ("builtins:nothing", "cannot be imported"),
        ("builtins:len", "a type is needed"),
    ):
        with pytest.raises(ConfigError, match=says):
            registry.find(name)


def test_a_selection_iterates_over_its_own_and_looks_up_others(installed: Path, registry: Registry[type]) -> None:
    install(installed, "kvc-a", {registry.group: {"text": "builtins:str", "data": "builtins:bytes"}})
    chosen = Selection(registry, {"one": "int"}, lambda name, kind: kind.__name__ if kind is str else None)
    assert list(chosen) == ["one"] and len(chosen) == 1
    assert chosen["text"] == "str" and chosen["builtins:str"] == "str"
    assert "data" not in chosen and "two" not in chosen and "nothing" not in chosen


def test_what_an_entry_point_names_can_be_added_again(installed: Path, registry: Registry[type]) -> None:
    install(installed, "kvc-a", {registry.group: {"three": "builtins:str"}})
    registry.add("three", str)
    assert registry.find("three") is str


def test_one_can_be_made_known_without_an_entry_point(registry: Registry[type]) -> None:
    registry.add("three", str)
    assert registry.find("three") is str
    registry.add("three", str)
    with pytest.raises(ConfigError, match="already"):
        registry.add("one", str)

"""YAML files within limits: each is refused at once, by every command that reads one."""

import time
from pathlib import Path

import pytest
import yaml

from kvcapsule.cli import main
from kvcapsule.yaml_files import MOST_BYTES, LimitError, read_yaml

BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))])
HOSTILE = {
    "aliases": (BOMB, "aliases stand for more than 100,000 values"),
    "merged": (BOMB.replace("[", "{k: [").replace("]", "]}"), "aliases stand for more than"),
    "itself": ("a: &a [*a]", "an alias stands within its own anchor"),
    "deep": ("[" * 200 + "]" * 200, "nested more than 64 deep"),
    "deeper": ("[" * 20_000, "nested more than 64 deep"),
    "large": ("a: " + "x" * MOST_BYTES, "has more than 262,144 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / "x.yaml").write_text(content)
    begin = time.monotonic()
    with pytest.raises(LimitError, match=message):
        read_yaml(tmp_path / "x.yaml")
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("words", [("train",), ("eval", "--suite"), ("eval", "--config"), ("bench", "--config")])
def test_commands_refuse_a_bomb(tmp_path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bomb.yaml").write_text(BOMB)
    assert main([*words, str(tmp_path / "bomb.yaml")]) == 2
    assert "aliases stand for more than 100,000 values" in capsys.readouterr().err


def test_plain_files_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    for text in ("", "a: 1\nb: [x, 2.5, null, true]\n", "base: &b {lr: 0.1}\nmine: {<<: *b, steps: 3}\nagain: *b\n"):
        path.write_text(text)
        assert read_yaml(path) == yaml.safe_load(text)
    for text in ("a: [1", "!!python/object:os.system {}", "a: 2026-13-45", "? [a]\n: 1"):
        path.write_text(text)
        with pytest.raises(yaml.YAMLError):
            read_yaml(path)
    with pytest.raises(OSError):
        read_yaml(tmp_path / "absent.yaml")

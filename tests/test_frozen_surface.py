"""The outside of kvcapsule, held against tests/golden/surface.json: options, JSON and config keys, tensor names, public
names.

A change of any of them is a change for users: it is made on purpose, named in CHANGELOG.md, and recorded by
`python tests/test_frozen_surface.py`, whose diff shows what changed.
"""

import contextlib
import io
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import kvcapsule
from kvcapsule import CapsuleConfig
from kvcapsule.capsule.span_header import SpanHeader
from kvcapsule.cli import COMMANDS, main
from kvcapsule.codec import FAMILIES
from kvcapsule.policy import POLICIES, TEXT_POLICIES

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "surface.json"
CAPSULES = ("pages-vlm-cross-layer", "pages-vlm-kvcapsule", "pages-vlm-transform", "pages-vlm-blocks")
_OPTION = re.compile(r"(?<![\w-])--[A-Za-z][\w.-]*")
_DEFINITION = re.compile(r"^ {2,4}(-\w, )?--[A-Za-z][\w.-]*", re.MULTILINE)


def printed(*arguments: str) -> str:
    """What the command writes to standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(list(arguments))
    return out.getvalue()


def options(command: str) -> list[str]:
    """The options that the command's help defines, sorted."""
    lines = [match.group() for match in _DEFINITION.finditer(printed(command, "--help"))]
    return sorted({option for line in lines for option in _OPTION.findall(line)})


def keys_of(value: Any, prefix: str = "") -> set[str]:
    """Every path of keys in a JSON value; list items share theirs. Keys that are data (names, numbers) count as *."""
    if isinstance(value, list):
        return set().union(*(keys_of(item, prefix + "[]") for item in value)) if value else set()
    if not isinstance(value, dict):
        return set()
    found: set[str] = set()
    for key, inner in value.items():
        path = f"{prefix}.{key}" if re.fullmatch(r"[a-z_][a-z0-9_]*", key) else f"{prefix}.*"
        found |= {path.lstrip(".")} | keys_of(inner, path)
    return found


def tensors(name: str) -> dict[str, str]:
    with safe_open(ROOT / "checkpoints" / name / "model.safetensors", "np") as file:
        return {key: file.get_slice(key).get_dtype() for key in sorted(file.keys())}


SURFACE: dict[str, Callable[[], Any]] = {
    "public names": lambda: sorted(kvcapsule.__all__),
    "options": lambda: {command: options(command) for command in COMMANDS},
    "methods --json": lambda: sorted(set().union(*json.loads(printed("methods", "--json", "-")))),
    "models --json": lambda: sorted(keys_of(json.loads(printed("models", "--json", "-")))),
    "estimate --json": lambda: sorted(
        keys_of(json.loads(printed("estimate", "--model", "pages-vlm", "--visual-tokens", "196", "--json", "-")))
    ),
    "capsule config": lambda: sorted(field.name for field in fields(CapsuleConfig)),
    "span header": lambda: sorted(field.name for field in fields(SpanHeader)),
    "codec configs": lambda: {
        name: sorted(field.name for field in fields(family.config)) for name, family in FAMILIES.items()
    },
    "policy settings": lambda: {
        name: sorted(field.name for field in fields(policy))  # type: ignore[arg-type]
        for name, policy in {**POLICIES, **TEXT_POLICIES}.items()
    },
    "tensors": lambda: {name: tensors(name) for name in CAPSULES},
}


@pytest.mark.parametrize("part", SURFACE)
def test_surface_is_what_was_recorded(part: str) -> None:
    recorded = json.loads(GOLDEN.read_text())
    assert SURFACE[part]() == recorded[part], (
        "if this is meant: python tests/test_frozen_surface.py, and a line in CHANGELOG.md"
    )


def test_help_shows_every_command_and_its_options() -> None:
    shown = {command: options(command) for command in COMMANDS}
    assert all(len(found) >= 2 for found in shown.values())
    assert {"--model", "--recipe", "--output"} <= set(shown["train"])


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({part: read() for part, read in SURFACE.items()}, indent=1) + "\n")

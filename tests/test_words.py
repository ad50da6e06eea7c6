"""Names and sizes of the code: no words of a private dialect as identifiers, no walls of parameters, no long files."""

import ast
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvcapsule", "training", "eval")
PRIVATE_WORDS = (
    # Participles and relative words that say nothing about the object that they name.
    *("felt", "told", "lent", "laid", "given", "taken", "found", "made", "asked", "turned", "joined", "kept_by"),
    *("each", "own", "whole", "usual", "allotted", "explained", "corrected", "risen", "settle", "waits"),
    # Puns in place of the field's terms.
    *("soften", "meet", "fall", "twin", "dial", "neighbours", "stacked"),
)
"""No identifier is one of these words. `found` -> the noun of the result, `own` -> the noun of the thing, and so on."""
EXEMPT: dict[str, tuple[str, ...]] = {
    "training/analysis/similarity.py": ("neighbours",),  # A key of the command's JSON.
}
"""By the beginning of a path: words that are part of the outside."""
MOST_PARAMETERS = 8
MOST_LINES = 300
REASON = "Over 300 lines: "
"""Begins the line of a long file's docstring that says why it is long."""


@cache
def sources() -> tuple[Path, ...]:
    """All Python files of the packages, relative to the root."""
    return tuple(sorted(path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")))


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of every name in a file; words in strings and comments are none."""
    with (ROOT / path).open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string


def exempt(path: Path) -> set[str]:
    return {word for prefix, words in EXEMPT.items() if path.as_posix().startswith(prefix) for word in words}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names of a function's parameters, without self and cls."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    names += [a.arg for a in (arguments.vararg, arguments.kwarg) if a is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_no_identifier_is_a_private_word() -> None:
    offenders = [
        f"{path}:{line}: {name}"
        for path in sources()
        for line, name in identifiers(path)
        if name in PRIVATE_WORDS and name not in exempt(path)
    ]
    assert not offenders, "name the thing:\n" + "\n".join(offenders)


def test_functions_have_few_parameters() -> None:
    """But for Triton's kernels, whose arguments must be scalars and pointers."""
    offenders = [
        f"{path}:{node.lineno}: {node.name} has {len(parameters(node))}"
        for path in sources()
        if not path.as_posix().startswith("kvcapsule/kernels/triton/")
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(parameters(node)) > MOST_PARAMETERS
    ]
    assert not offenders, f"more than {MOST_PARAMETERS} parameters:\n" + "\n".join(offenders)


def test_long_files_say_why() -> None:
    offenders = []
    for path in sources():
        text = (ROOT / path).read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MOST_LINES:
            docstring = ast.get_docstring(ast.parse(text)) or ""
            if not any(line.startswith(REASON) for line in docstring.splitlines()):
                offenders.append(f"{path}: {lines} lines, and no line '{REASON}...' in its docstring")
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(self, a, /, b, *c, d, **e): ...", ["a", "b", "d", "c", "e"]),
        ("def f(cls): ...", []),
        ("async def f(a, b=1): ...", ["a", "b"]),
    ],
)
def test_parameters_are_counted(source: str, names: list[str]) -> None:
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    assert parameters(function) == names

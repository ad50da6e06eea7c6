"""`kvcapsule methods`: every codec family and policy, what it is, whose it is and what it takes.

All of it is read from the registries: the summary is the first paragraph of a method's module (of its class, for a
policy of the text alone), papers are those that this paragraph or the first one of its class names, settings are the
fields of its config or the arguments of its constructor. The registries are imported inside `main`: `--help` and a
mistyped option do not wait for them.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from .errors import Parser

PROG = "kvcapsule methods"
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")
_WIDE = 160
"""Columns of a table that is not printed to a terminal."""


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    json: bool


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method. Its fields are the keys of the JSON."""

    name: str
    """In its registry."""
    kind: str
    """"codec" (trained; a capsule is made of it), "policy" (training-free) or "text policy" (likewise; stands beside
    one of the others)."""
    summary: str
    papers: list[str]
    """arXiv numbers."""
    required: list[str]
    """Settings without a default."""
    defaults: dict[str, Any]
    """The other settings."""


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return 0."""
    options = _parser().parse_args(argv, namespace=Options())
    found = list(known_methods())
    if options.json:
        print(json.dumps([asdict(method) for method in found], indent=2, ensure_ascii=False))
    else:
        _print_table(found)
    return 0


def known_methods() -> Iterator[MethodInfo]:
    """Codec families, then policies, then those for the text alone, in the order of their registries."""
    from ..codec import FAMILIES
    from ..policy import POLICIES, TEXT_POLICIES

    for name, family in ((name, family.config) for name, family in FAMILIES.items()):
        with_default = {f.name: f.default for f in fields(family) if f.default is not MISSING}
        yield _info(name, "codec", family, [f.name for f in fields(family) if f.name not in with_default], with_default)
    for kind, policies in (("policy", POLICIES), ("text policy", TEXT_POLICIES)):
        for name, policy in policies.items():
            taken = inspect.signature(policy).parameters.values()
            required = [p.name for p in taken if p.default is p.empty]
            yield _info(name, kind, policy, required, {p.name: p.default for p in taken if p.default is not p.empty})


def _info(name: str, kind: str, method: type, required: list[str], defaults: dict[str, Any]) -> MethodInfo:
    of_module, of_class = (_first_paragraph(documented) for documented in (sys.modules[method.__module__], method))
    # The two policies of the text share a module, and one paper is named further down.
    summary, source = (of_class, inspect.getdoc(method) or "") if kind == "text policy" else (of_module, of_class)
    papers = list(dict.fromkeys(_PAPER.findall(f"{summary} {source}")))
    return MethodInfo(name, kind, summary, papers, required, defaults)


def _first_paragraph(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def _print_table(found: list[MethodInfo]) -> None:
    from rich.table import Table

    from .tables import print_table

    table = Table("method", "kind", "what it does", "arXiv", "settings")
    for method in found:
        settings = [*method.required, *(f"{name}={_shown(value)}" for name, value in method.defaults.items())]
        table.add_row(method.name, method.kind, method.summary, "\n".join(method.papers), ", ".join(settings))
    print_table(table, _WIDE)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="List the codec families and policies, with their papers and defaults.")
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    return parser

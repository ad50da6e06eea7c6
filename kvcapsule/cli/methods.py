"""`kvcapsule methods`: every codec family and policy, with its paper and its settings.

All of it is read from the registries: the summary is the first paragraph of a method's module (of its class, for a
policy of the text alone), the papers are named in this paragraph or in the first one of its class, the settings are the
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
from typing import Any, TypeVar

from ..errors import KVCapsuleError
from ..extensions import Registry
from .errors import Parser, complain
from .results import STDOUT, add_json_option, add_wide_option, require_writable, write_json

T = TypeVar("T")
PROG = "kvcapsule methods"
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    json: str | None
    wide: bool


@dataclass(frozen=True)
class MethodInfo:
    """A method of the registries. Its fields are the keys of the JSON."""

    name: str
    """Its name in the registry."""
    kind: str
    """"codec" (a family of trained capsules), "policy" (training-free) or "text policy" (training-free, for the text
    alone; combined with one of the others)."""
    summary: str
    papers: list[str]
    """arXiv numbers."""
    required: list[str]
    """Settings without a default."""
    defaults: dict[str, Any]
    """The other settings."""


def main(argv: list[str] | None = None) -> int:
    """Print the table, or the JSON, and return the exit code."""
    options = _parser().read(argv, Options())
    methods = list(known_methods())
    try:
        require_writable([options.json])
        if options.json != STDOUT:
            _print_table(methods, options.wide)
        write_json(options.json, [asdict(method) for method in methods])
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def known_methods() -> Iterator[MethodInfo]:
    """Codec families, then policies, then those for the text alone, in the order of their registries."""
    from ..codec import REGISTRY as FAMILY_REGISTRY
    from ..policy import REGISTRY as POLICY_REGISTRY
    from ..policy import TEXT_POLICIES

    for name, family in ((name, family.config) for name, family in _loaded(FAMILY_REGISTRY)):
        with_default = {f.name: f.default for f in fields(family) if f.default is not MISSING}
        yield _info(name, "codec", family, [f.name for f in fields(family) if f.name not in with_default], with_default)
    for kind, registered in (("policy", _loaded(POLICY_REGISTRY)), ("text policy", TEXT_POLICIES.items())):
        for name, policy in registered:
            settings = inspect.signature(policy).parameters.values()
            required = [p.name for p in settings if p.default is p.empty]
            defaults = {p.name: p.default for p in settings if p.default is not p.empty}
            yield _info(name, kind, policy, required, defaults)


def _loaded(registry: Registry[T]) -> Iterator[tuple[str, T]]:
    """All of a registry, those of other packages too; of a package that cannot be imported a line on stderr."""
    for name in registry.names():
        try:
            yield name, registry.find(name)
        except KVCapsuleError as error:
            complain(PROG, error)


def _info(name: str, kind: str, method: type, required: list[str], defaults: dict[str, Any]) -> MethodInfo:
    of_module, of_class = (_first_paragraph(documented) for documented in (sys.modules[method.__module__], method))
    # The two policies of the text share a module, and one paper is named further down.
    summary, source = (of_class, inspect.getdoc(method) or "") if kind == "text policy" else (of_module, of_class)
    papers = list(dict.fromkeys(_PAPER.findall(f"{summary} {source}")))
    return MethodInfo(name, kind, summary, papers, required, defaults)


def _first_paragraph(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").partition("\n\n")[0].split())


def _print_table(methods: list[MethodInfo], wide: bool) -> None:
    from .tables import NAME, TEXT, Column, ReportTable, print_report

    table = ReportTable(
        [
            Column("method", NAME),
            Column("kind", NAME),
            Column("arXiv", NAME),
            Column("what it does", TEXT),
            Column("settings", TEXT, wide=True),
        ]
    )
    for method in methods:
        settings = [*method.required, *(f"{name}={_shown(value)}" for name, value in method.defaults.items())]
        table.add(method.name, method.kind, "\n".join(method.papers), method.summary, ", ".join(settings))
    print_report(table, wide=wide)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="List the codec families and policies, with their papers and defaults.")
    add_json_option(parser)
    add_wide_option(parser)
    return parser

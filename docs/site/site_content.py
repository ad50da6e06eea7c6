"""The files of the site, and what is made of them; nothing here imports mkdocs."""

import re
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIRST = "README.md"
ASSETS = ("docs/site/site.css", "docs/site/iframe-worker.js")
"""Files of the site that no page links to."""
PUBLIC = {
    "Models and inputs": ("load_vlm", "conversation", "encode", "KVGeometry", "VisualSpan", "find_spans"),
    "Capsules": ("Capsule", "CapsuleConfig", "ImageStore"),
    "Inference": ("attach", "CapsuleCache", "cache_argument", "output_cache", "Segment"),
    "Errors": ("KVCapsuleError", "CapsuleError", "GeometryError", "ModelMismatchWarning"),
}
"""Names of the package `kvcapsule`, in the order of their page."""
CONTRACT = (
    "kvcapsule.methods.method.Method",
    "kvcapsule.methods.layer_prefill.LayerPrefill",
    "kvcapsule.methods.method.Compressed",
    "kvcapsule.policy.base.Policy",
    "kvcapsule.policy.base.VisualPolicy",
    "kvcapsule.policy.base.TokenPruning",
    "kvcapsule.policy.base.HeadPruning",
    "kvcapsule.policy.combine.Combined",
)
"""What a method of another package builds on."""
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*?\bsrc\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?=[^>]*\brel\s*=\s*[\"']?(?:stylesheet|preload|modulepreload|preconnect|dns-prefetch|icon))"
    r"[^>]*?\bhref\s*=\s*[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|url\(\s*[\"']?((?:https?:)?//[^\"')\s]+)|@import\s+[\"']((?:https?:)?//[^\"']+)",
    re.IGNORECASE,
)


def reachable(root: Path = ROOT) -> list[str]:
    """Files of the checkout that pages link to, from README.md on, by their paths in it; pages end in .md.

    Raises:
        FileNotFoundError: for a link to a file that is not there.
    """
    seen: dict[str, None] = {}
    pending = [FIRST]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        file = root / name
        if not file.is_file():
            raise FileNotFoundError(f"a page links to {name}, which is no file of the checkout.")
        seen[name] = None
        if file.suffix != ".md":
            continue
        for target in _LINK.findall(_FENCE.sub("", file.read_text(encoding="utf-8"))):
            path = target.partition("#")[0]
            if path and "://" not in path:
                pending.append(str((file.parent / path).resolve().relative_to(root)))
    return sorted(seen)


def with_blank_lines(text: str) -> str:
    """A page with a blank line before each list and table, which Python's Markdown needs and GitHub's does not."""
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        fenced ^= line.startswith("```")
        before = lines[-1] if lines else ""
        if not fenced and before.strip() and (_begins_list(line, before) or _begins_table(line, before)):
            lines.append("")
        lines.append(line)
    return "\n".join(lines) + "\n"


def _begins_list(line: str, before: str) -> bool:
    return re.match(r"(- |\d+\. )", line) is not None and re.match(r"(- |\d+\. |\s)", before) is None


def _begins_table(line: str, before: str) -> bool:
    return line.startswith("|") and not before.startswith("|")


def network_loads(text: str) -> list[str]:
    """Addresses that a browser would fetch from the network to show a page or style; links for readers are none."""
    return [next(filter(None, groups)) for groups in _LOADS.findall(text)]


def python_page(homes: dict[str, str]) -> str:
    """The reference of the package's public names.

    Args:
        homes: name -> module inside kvcapsule.
    """
    lines = ["# Python", "", "`from kvcapsule import NAME`. Methods are in `kvcapsule.policy`.", ""]
    for title, names in PUBLIC.items():
        lines += [f"## {title}", ""]
        lines += [line for name in names for line in (f"::: kvcapsule.{homes[name]}.{name}", "")]
    return "\n".join(lines)


def methods_page(policies: Sequence[str], families: Sequence[str]) -> str:
    """The reference of policies, codec families and of what they are built on.

    Args:
        policies: their classes, as module.Class.
        families: the configs of codec families, likewise.
    """
    lines = [
        "# Methods and policies",
        "",
        "What each does and what was chosen is in [methods](../docs/methods.md).",
        "",
    ]
    sections = {"Policies": policies, "Codec families": families, "To build a method on": CONTRACT}
    for title, names in sections.items():
        lines += [f"## {title}", ""]
        lines += [line for name in names for line in (f"::: {name}", "")]
    return "\n".join(lines)


def commands_page(helps: dict[str, str]) -> str:
    """The reference of the commands.

    Args:
        helps: command -> what its --help prints.
    """
    lines = ["# Commands", "", "What `--help` prints of each.", ""]
    for command, text in helps.items():
        lines += [f"## kvcapsule {command}", "", "```text", text.strip(), "```", ""]
    return "\n".join(lines)

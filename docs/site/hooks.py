"""Hooks of mkdocs (mkdocs.yml): the site is README.md and every file of the checkout that links lead to from there,
each at its place in the tree, so that all links are those of the checkout; and pages of reference, made from docstrings
and from the commands' own help."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

sys.path.insert(0, str(Path(__file__).parent))
import site_content as content

_SHIM = "https://unpkg.com/iframe-worker/shim"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The site's files: the theme's, and those of the checkout in place of what mkdocs saw in docs/."""
    theme = [file for file in files if not Path(file.abs_src_path or "").is_relative_to(config.docs_dir)]
    names = [*content.reachable(), *content.ASSETS]
    taken = [File.generated(config, name, abs_src_path=str(content.ROOT / name)) for name in names]
    reference = [File.generated(config, f"reference/{name}.md", content=text) for name, text in _reference().items()]
    return Files([*theme, *taken, *reference])


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lists and tables as Python's Markdown reads them."""
    return content.with_blank_lines(markdown)


def on_post_page(output: str, page: Page, **_: Any) -> str:
    """The page with the theme's one script of the network in a copy of its own, by which search runs from the disk."""
    return output.replace(_SHIM, get_relative_url(content.ASSETS[1], page.url))


def on_post_template(output_content: str, **_: Any) -> str:
    """Likewise the page that servers show for a missing one, whose links begin at the site's root."""
    return output_content.replace(_SHIM, f"/{content.ASSETS[1]}")


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site that would load anything from the network.

    Raises:
        PluginError: naming the pages and addresses.
    """
    folder = Path(config.site_dir)
    loads = {
        str(file.relative_to(folder)): content.network_loads(file.read_text(encoding="utf-8"))
        for suffix in ("html", "css")
        for file in folder.rglob(f"*.{suffix}")
    }
    if bad := [f"{name}: {', '.join(addresses)}" for name, addresses in loads.items() if addresses]:
        raise PluginError("pages load from the network:\n" + "\n".join(bad))


def _reference() -> dict[str, str]:
    """The generated pages, by name."""
    os.environ["COLUMNS"] = "94"
    import kvcapsule
    from kvcapsule.cli import COMMANDS
    from kvcapsule.codec import FAMILIES
    from kvcapsule.policy import POLICIES

    policies = [f"{policy.__module__}.{policy.__qualname__}" for policy in POLICIES.values()]
    families = [f"{family.config.__module__}.{family.config.__qualname__}" for family in FAMILIES.values()]
    return {
        "python": content.python_page(kvcapsule._HOME),
        "methods": content.methods_page(policies, families),
        "commands": content.commands_page({command: _help(command) for command in COMMANDS}),
    }


def _help(command: str) -> str:
    from kvcapsule.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([command, "--help"])
    # Strokes of the backspace are for terminals.
    return re.sub(".\x08", "", out.getvalue())

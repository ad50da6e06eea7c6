"""What `kvcapsule.eval.studies.long_answer` measured, for people: a picture, a table and the page
docs/long-answer.md."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..report import markdown

_COLOURS = ("#555555", "#0072b2", "#56b4e9", "#000000", "#009e73")
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart; methods in their order."""
_MODULE = "kvcapsule.eval.studies.long_answer"
"""Shown in the command: a result may have been measured when the module had another name."""
_FILE, _JSON = Path("docs/long-answer.md"), "eval/results/long-answer.json"
_INTRODUCTION = (
    "Bytes of the cache of one answer while {tokens} tokens are written after a page and a question. `full` is"
    " transformers' own cache. A capsule makes the image small and lets the answer grow. `r-kv` keeps {budget} of the"
    " written tokens, beside a buffer of {buffer}; `r-kv, prompt as well` keeps as many of prompt and answer together."
)
_READING = (
    "The steps in the curves are the capacity that the buffer of the newest tokens reserves. While an answer is shorter"
    " than buffer and budget, R-KV drops nothing, and stores its observing queries in addition to the tokens."
)
_METHOD = (
    "The end token is suppressed to make answers long; past its own end an answer answers nothing. *Agreement* is how"
    " often a method's likeliest next token is the full cache's while the full cache's answer is written: how closely a"
    " method follows, not how well it answers. Bytes are measured from storages, reserved capacity and observing"
    " queries included, the codecs' parameters not."
)


def picture(found: Mapping[str, Any]) -> Figure:
    """One line a method, bytes over tokens."""
    figure = Figure(figsize=(7.5, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, colour in zip(found["rows"], _COLOURS, strict=True):
        axes.plot([held / 2**10 for held in row["bytes"]], color=colour, linewidth=1.6, label=row["method"])
    axes.set_title(
        f"{found['model']}: {found['tokens']} tokens written behind a page and a question", loc="left", fontsize=11
    )
    axes.set_xlim(0, found["tokens"])
    axes.set_ylim(0)
    axes.set_xlabel("tokens written")
    axes.set_ylabel("cache, KiB an answer")
    axes.grid(color="#e5e5e5", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def table(found: Mapping[str, Any]) -> str:
    """What a cache holds as the answer begins, at its most and at its end, as Markdown."""
    head = ["method", "bytes at the first token", "at most", "at the last", "agreement"]
    lines = [head]
    for row in found["rows"]:
        held: Sequence[int] = row["bytes"]
        lines.append([row["method"], *(f"{n:,}" for n in (held[0], max(held), held[-1])), f"{row['agreement']:.3f}"])
    return markdown.grid(lines)


def page(found: Mapping[str, Any]) -> str:
    """The page, in Markdown; it shows the picture beside it and links to the JSON under eval/results/."""
    settings = next(row["settings"] for row in found["rows"] if row["method"] == "r-kv")
    data, machine = found["data"], found["machine"]
    place = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    facts = (
        f"{found['model']} on {data['source']} ({data['split']}, seed {data['seed']}), {data['size']} questions in one"
        f" batch, {found['dtype']}; {place}, {machine['threads']} threads; {packages}."
    )
    numbers = {"tokens": f"{found['tokens']:,}", "budget": settings["budget_tokens"], "buffer": settings["buffer"]}
    command = re.sub(r"^python -m \S+", f"python -m {_MODULE}", found["command"])
    parts = [
        "# A long answer",
        markdown.paragraph(_INTRODUCTION.format(**numbers)),
        table(found),
        "![bytes of the cache over the written tokens](long-answer.png)",
        markdown.paragraph(_READING),
        markdown.paragraph(_METHOD),
        markdown.paragraph(facts),
        markdown.command_block(_FILE, command, _JSON, "Written by `make long-answer`, which runs this command"),
    ]
    return "\n\n".join(parts) + "\n"

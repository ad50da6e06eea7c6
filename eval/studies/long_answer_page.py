"""What `kvcapsule.eval.studies.long_answer` measured, for people: a picture, a table and the page
docs/long-answer.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#555555", "#0072b2", "#56b4e9", "#000000", "#009e73")
"""Of Okabe and Ito's palette, which colour-blind readers can tell apart; methods in their order."""
_PAGE = """# A long answer

What the cache of one answer holds while {tokens} tokens are written behind a page and a question. `full` is \
transformers' own cache.
A capsule makes the image small and lets the answer grow. `r-kv` keeps {budget} of the tokens written, beside a \
buffer of {buffer};
`r-kv, prompt as well` keeps so many of prompt and answer together.

{table}

![bytes of the cache over the tokens written](long-answer.png)

The steps are the room that the newest tokens' buffer takes in advance. While an answer is shorter than buffer and \
budget R-KV drops
nothing, and what it holds beside the tokens, the queries that observe, is on top.

Answers are made long: the end token is suppressed, and past its own end an answer is no answer to anything. \
*Agreement* is how often a
method's likeliest next token is the full cache's, while the full cache's answer is written: it says how closely a \
method follows, not
how well it answers. Bytes are measured from storages; room to grow and the queries that observe are included, the \
codecs' parameters
are not.

{facts}
Written by `{command}` (`make long-answer`; [JSON](../eval/results/long-answer.json)).
"""


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
    lines = [head, ["---"] * len(head)]
    for row in found["rows"]:
        held: Sequence[int] = row["bytes"]
        lines.append([row["method"], *(f"{n:,}" for n in (held[0], max(held), held[-1])), f"{row['agreement']:.3f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(found: Mapping[str, Any]) -> str:
    """The page, in Markdown; it shows the picture beside it and the JSON under eval/results/."""
    settings = next(row["settings"] for row in found["rows"] if row["method"] == "r-kv")
    data, machine = found["data"], found["machine"]
    place = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    facts = (
        f"{found['model']} on {data['source']} ({data['split']}, seed {data['seed']}), {data['size']} questions in one"
        f" batch, {found['dtype']}; {place}, {machine['threads']} threads; {packages}."
    )
    numbers = {"tokens": f"{found['tokens']:,}", "budget": settings["budget_tokens"], "buffer": settings["buffer"]}
    return _PAGE.format(table=table(found), facts=facts, command=found["command"], **numbers)

"""Tables of results in Markdown files: a table stands between two marker lines, and only what is between them is
replaced."""

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kvcapsule.cli.results import shown_path, write_whole
from kvcapsule.errors import InputError
from kvcapsule.methods.shown_names import shown_name

from .rows import asked_later, is_wide, unseen_question

_END = "<!-- end of table -->"
_WIDTH = 120
_WIDE_NOTE = (
    "The run's elements had {bits} bits. *Compression as run* divides the full cache's measured bytes by the method's."
    " *Compression vs 16 bit* counts the full cache at 16 bits an element and the method as it was measured: the fair"
    " number for few-bit codes. Methods that store plain elements (pruning, latents without `int`) would store half the"
    " bytes at 16 bits; *compression as run* is the fair number for them."
)
_TIME_NOTE = (
    "*Prefill time* runs from the call to the first logits and includes the method's own pass: 1.10 is 10 % longer than"
    " the full cache's. *Tokens/s* is the decoding speed: above 1 is faster than the full cache."
)
_LATER_NOTE = (
    "The questions were asked after the images were compressed (`--protocol ask-later`); bytes are those of the prompts"
    " up to the last image."
)
_FEW_TASKS = 4
"""Tasks that a table of few columns has room for."""
_LOSS_NOTE = "*Loss* is that of the mean accuracy against the full cache."


def require_place(path: Path, name: str) -> None:
    """Raises InputError unless the file has a place for the table of this name, or is not there yet."""
    if path.exists():
        _split(_text(path), path, name)


def refresh(path: Path, name: str, result: Mapping[str, Any], json: str | None = None, plot: str | None = None) -> None:
    """Put a run's table between the markers of this name; a file that is not there is made.

    Args:
        path: a Markdown file.
        name: of the suite.
        result: what docs/eval-json.md describes.
        json: the file of the run's object, for a link.
        plot: its picture.

    Raises:
        InputError: if the file has no such markers.
        OSError: if it cannot be written.
    """
    write_between_markers(path, name, _block(path, result, json, plot))


def write_between_markers(path: Path, name: str, block: str) -> None:
    """Write Markdown between the markers of this name; a file that is not there is made.

    Raises:
        InputError: if the file has no such markers.
        OSError: if it cannot be written.
    """
    text = _text(path) if path.exists() else blank(name, [name])
    before, after = _split(text, path, name)
    write_whole(path, f"{before}{_begin(name)}\n{block}\n{_END}{after}".encode())


def blank(title: str, names: Sequence[str]) -> str:
    """A page with an empty place for each of the tables."""
    return "\n".join([f"# {title}\n", *(f"{_begin(name)}\n{_END}\n" for name in names)])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as a Markdown table, in the order of the run; times, and bytes on the host, where there are such."""
    tasks, wide = list(rows[0]["accuracy"]), is_wide(rows)
    later, timed, hosted = (
        asked_later(rows),
        _timed(rows),
        any(row["host_kv_bytes"] for row in rows),
    )
    full_mean = mean(rows[0]["accuracy"].values())
    compressions = ["compression as run", "compression vs 16 bit"] if wide else ["compression"]
    head = [
        "method",
        *compressions,
        "visual KV bytes per question",
        "all KV bytes per question",
        *(["bytes on the host"] if hosted else []),
        *tasks,
        "mean accuracy",
        "loss in points",
        "same answers",
        *_kl_heads(rows),
        "decoder bytes",
        *(["prefill time vs full", "tokens/s vs full"] if timed else []),
    ]
    lines = [head]
    for row in rows:
        score = mean(row["accuracy"].values())
        lines.append(
            [
                shown_name(row["method"]),
                *(f"{row[key]:.2f}x" for key in ("compression", "compression16")[: len(compressions)]),
                f"{row['visual_kv_bytes']:,}",
                f"{row['kv_bytes']:,}",
                *([f"{row['host_kv_bytes']:,}"] if hosted else []),
                *(f"{row['accuracy'][task]:.3f}" for task in tasks),
                f"{score:.3f}",
                # Adding 0 turns a negative zero into one without a sign.
                f"{round(100 * (full_mean - score), 1) + 0:.1f}",
                *_closeness(row, later),
                f"{row['parameter_bytes']:,}",
                *(f"{row[key]:.2f}" for key in ("prefill_ratio", "tokens_per_s_ratio") if timed),
            ]
        )
    return grid(lines)


def short_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A run as a table of few columns, the README's: times where they were measured, and of many tasks the mean."""
    tasks, later = list(rows[0]["accuracy"]), asked_later(rows)
    times = {"prefill_ratio": "prefill time vs full", "tokens_per_s_ratio": "tokens/s vs full"} if _timed(rows) else {}
    head = ["method", "visual KV bytes per question", "compression vs 16 bit", "compression as run"]
    head += [*(tasks if len(tasks) <= _FEW_TASKS else ["accuracy"]), "same answers", *_kl_heads(rows), *times.values()]
    lines = [
        [
            shown_name(row["method"]),
            f"{row['visual_kv_bytes']:,}",
            *(f"{row[key]:.2f}x" for key in ("compression16", "compression")),
            *(f"{accuracy:.3f}" for accuracy in _accuracies(row)),
            *_closeness(row, later),
            *(f"{row[key]:.2f}" for key in times),
        ]
        for row in rows
    ]
    return grid([head, *lines])


def short_note(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the columns of `short_table` mean."""
    few = len(rows[0]["accuracy"]) <= _FEW_TASKS
    tasks = "The task columns are accuracies" if few else "*Accuracy* is the mean over the tasks"
    return [
        f"{tasks}, *same answers* the share of answers that equal the full cache's."
        f" *Compression as run* is of elements of {element_bits(rows)} bits; *compression vs 16 bit*"
        " counts the full cache at 16 bits and the method as it was measured (pruned tokens, too, would take half the"
        " bytes there).",
        *(["Times: full cache = 1."] if _timed(rows) else []),
    ]


def _timed(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether times were measured."""
    return rows[0]["prefill_ratio"] is not None


def _accuracies(row: Mapping[str, Any]) -> list[float]:
    """By task, or of many tasks the mean."""
    values = list(row["accuracy"].values())
    return values if len(values) <= _FEW_TASKS else [mean(values)]


def grid(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its head."""
    head, *rest = lines
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rest))


def _kl_heads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return ["KL in nats", *(["KL of the first token"] if asked_later(rows) else [])]


def _closeness(row: Mapping[str, Any], later: bool) -> list[str]:
    """Share of answers that equal the full cache's, the KL divergence, and that of the first token in a run that asked
    later."""
    kls = [row[key] for key in ("kl", "first_token_kl")[: 1 + later]]
    return [f"{row['agreement']:.3f}", *("–" if kl is None else f"{kl:.2g}" for kl in kls)]


def protocol_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader must know of a run that asked later; empty for another."""
    return [_LATER_NOTE, *filter(None, [unseen_question(rows)])] if asked_later(rows) else []


def _block(path: Path, result: Mapping[str, Any], json: str | None, plot: str | None) -> str:
    """The table and all that its numbers depend on."""
    rows = result["rows"]
    facts_and_notes = paragraph(facts(result), *protocol_notes(rows), _LOSS_NOTE)
    parts = [table(rows), facts_and_notes, command_block(path, result["command"], json)]
    if _timed(rows):
        parts.append(paragraph(_TIME_NOTE))
    if is_wide(rows):
        parts.append(paragraph(_WIDE_NOTE.format(bits=element_bits(rows))))
    if plot is not None:
        parts.append(f"![losses against bytes]({link(path, plot)})")
    return "\n\n".join(parts)


def facts(result: Mapping[str, Any]) -> str:
    """What a run was measured on and with, as a sentence."""
    data, machine = result["data"], result["machine"]
    place = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{result['model']} on {data['source']} ({data['split']}, seed {data['seed']}), {result['rows'][0]['n']}"
        f" questions in batches of {result['batch']}, {result['dtype']}, seed {result['seed']}; {place},"
        f" {machine['threads']} threads; {versions}."
    )


def element_bits(rows: Sequence[Mapping[str, Any]]) -> int:
    """Bits of an element of the full cache in this run."""
    bits: int = round(16 * rows[0]["compression"] / rows[0]["compression16"])
    return bits


def command_block(path: Path, command: str, json: str | None = None, lead: str | None = None) -> str:
    """The commands that measured a result, one a line, with a link to it. Where they name a page with `--report`, it is
    the page that the table stands on now."""
    page = f"--report {shown_path(str(path))}"
    lines = [re.sub(r"--report \S+", lambda _: page, line) for line in command.split(" && ")]
    source = "" if json is None else f" ([JSON]({link(path, json)}))"
    lead = lead or ("Printed by this command" if len(lines) == 1 else "Printed by these commands")
    return "\n".join([f"{lead}{source}:", "", "```bash", *lines, "```"])


def paragraph(*sentences: str) -> str:
    """Prose of at most 120 columns a line."""
    return textwrap.fill(" ".join(sentences), _WIDTH, break_long_words=False, break_on_hyphens=False)


def link(path: Path, target: str) -> str:
    """How the file `path` names another file."""
    return Path(os.path.relpath(target, path.parent)).as_posix()


def _begin(name: str) -> str:
    return f"<!-- table: {name} -->"


def _split(text: str, path: Path, name: str) -> tuple[str, str]:
    """The text before and after the table's place in a file, markers not included."""
    blocks = re.findall(f"{re.escape(_begin(name))}(.*?){re.escape(_END)}", text, flags=re.DOTALL)
    if len(blocks) != 1 or "<!-- table:" in blocks[0]:
        raise InputError(
            f"{path} has no place for the table, or several: write the line {_begin(name)} once, and {_END} behind it."
        )
    before, _, rest = text.partition(_begin(name))
    return before, rest.partition(_END)[2]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error

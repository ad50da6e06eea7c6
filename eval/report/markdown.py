"""The table of a suite in a Markdown file: one part of the file is written anew by every run, the rest is left as it
is."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from kvcapsule.cli.results import write_whole
from kvcapsule.errors import InputError

from .rows import is_wide

_END = "<!-- end of table -->"
_WIDE_NOTE = (
    "Elements had {bits} bits. *At 16 bits* is the compression with the full cache counted at 16 bits an element and"
    " the method as it was measured; *compression* sets what was measured against each other. Rows that store"
    " unquantised elements would take half the bytes at 16 bits, which is what their *compression* shows."
)
_TIME_NOTE = (
    "*Prefill time* is from the call to the first logits, the method's own pass included, against the full cache's:"
    " 1.10 is ten percent longer. *Tokens/s* are those of decoding, against the full cache's."
)


def require_place(path: Path, name: str) -> None:
    """Raises InputError unless the file has a place for the table of this name, or is not there yet."""
    if path.exists():
        _split(_text(path), path, name)


def refresh(path: Path, name: str, found: Mapping[str, Any], json: str | None = None, plot: str | None = None) -> None:
    """Put a run's table between the markers of this name; a file that is not there is made.

    Args:
        path: a Markdown file.
        name: of the suite.
        found: what docs/eval-json.md describes.
        json: the file of the run's object, for a link.
        plot: its picture.

    Raises:
        InputError: if the file has no such markers.
        OSError: if it cannot be written.
    """
    put(path, name, _block(path, found, json, plot))


def put(path: Path, name: str, block: str) -> None:
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
    timed, hosted = rows[0]["prefill_ratio"] is not None, any(row["host_kv_bytes"] for row in rows)
    whole = mean(rows[0]["accuracy"].values())
    compressions = ["compression", "at 16 bits"] if wide else ["compression"]
    head = [
        "method",
        *compressions,
        "visual KV bytes a question",
        "all KV bytes a question",
        *(["on the host"] if hosted else []),
        *tasks,
        "mean",
        "loss, points",
        "agreement",
        "KL",
        "parameter bytes",
        *(["prefill time", "tokens/s"] if timed else []),
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        score = mean(row["accuracy"].values())
        lines.append(
            [
                row["method"],
                *(f"{row[key]:.2f}x" for key in ("compression", "compression16")[: len(compressions)]),
                f"{row['visual_kv_bytes']:,}",
                f"{row['kv_bytes']:,}",
                *([f"{row['host_kv_bytes']:,}"] if hosted else []),
                *(f"{row['accuracy'][task]:.3f}" for task in tasks),
                f"{score:.3f}",
                # Adding 0 turns a negative zero into one without a sign.
                f"{round(100 * (whole - score), 1) + 0:.1f}",
                f"{row['agreement']:.3f}",
                "–" if row["kl"] is None else f"{row['kl']:.2g}",
                f"{row['parameter_bytes']:,}",
                *(f"{row[key]:.2f}" for key in ("prefill_ratio", "tokens_per_s_ratio") if timed),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _block(path: Path, found: Mapping[str, Any], json: str | None, plot: str | None) -> str:
    """The table and all that its numbers depend on."""
    data, machine, rows = found["data"], found["machine"], found["rows"]
    place = machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    facts = (
        f"{found['model']} on {data['source']} ({data['split']}, seed {data['seed']}), {rows[0]['n']} questions in"
        f" batches of {found['batch']}, {found['dtype']}, seed {found['seed']}; {place}, {machine['threads']} threads;"
        f" {versions}."
    )
    source = "" if json is None else f" ([JSON]({link(path, json)}))"
    parts = [
        table(rows),
        f"{facts} Loss is that of the mean accuracy against the full cache. Printed by `{found['command']}`{source}.",
    ]
    if rows[0]["prefill_ratio"] is not None:
        parts.append(_TIME_NOTE)
    if is_wide(rows):
        parts.append(_WIDE_NOTE.format(bits=round(16 * rows[0]["compression"] / rows[0]["compression16"])))
    if plot is not None:
        parts.append(f"![accuracy against visual bytes]({link(path, plot)})")
    return "\n\n".join(parts)


def link(path: Path, target: str) -> str:
    """How the file `path` names another file."""
    return Path(os.path.relpath(target, path.parent)).as_posix()


def _begin(name: str) -> str:
    return f"<!-- table: {name} -->"


def _split(text: str, path: Path, name: str) -> tuple[str, str]:
    """What stands before and behind the table's part of a file, markers not included."""
    found = re.findall(f"{re.escape(_begin(name))}(.*?){re.escape(_END)}", text, flags=re.DOTALL)
    if len(found) != 1 or "<!-- table:" in found[0]:
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

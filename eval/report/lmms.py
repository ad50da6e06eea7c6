"""The table of what lmms-eval and `kvcapsule eval` say of the same questions (kvcapsule.eval.studies.lmms)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import markdown


def table(result: Mapping[str, Any]) -> str:
    """A Markdown table with a row for each method."""
    lines = [
        [
            "`--model_args pretrained=...,`",
            "accuracy: kvcapsule eval",
            "accuracy: lmms-eval",
            "same answers",
            "same scores",
        ]
    ]
    lines[0] += ["visual KV bytes per question: kvcapsule eval", "lmms-eval"]
    for row in result["rows"]:
        lines.append(
            [
                row["method"],
                *(f"{row['accuracy'][side]:.5f}" for side in ("eval", "lmms")),
                *(f"{row[key]} of {row['n']}" for key in ("same_answers", "same_scores")),
                *(f"{row['visual_kv_bytes'][side]:,.0f}" for side in ("eval", "lmms")),
            ]
        )
    return markdown.grid(lines)


def refresh(page: Path, name: str, result: Mapping[str, Any], file: str) -> None:
    """Put the table, what it was measured with and its command between the markers of this name.

    Raises:
        InputError: if the page has no such markers.
    """
    block = [table(result), markdown.paragraph(markdown.facts(result))]
    markdown.write_between_markers(
        page, name, "\n\n".join([*block, markdown.command_block(page, result["command"], file)])
    )

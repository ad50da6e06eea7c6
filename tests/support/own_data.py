"""Questions in a file, as a user has them."""

import json
from pathlib import Path

from kvcapsule.testbeds.pages import pages


def jsonl_of_pages(path: Path, count: int, split: str = "train") -> str:
    """Write a JSON Lines file of pages with the columns image, question and answer, and its images beside it."""
    lines = []
    for index, row in enumerate(pages(split, count)):
        image = path.with_name(f"{path.stem}-{index}.png")
        row["image"].save(image)
        lines.append(json.dumps({"image": str(image), "question": row["prompt"], "answer": row["answer"]}))
    path.write_text("\n".join(lines))
    return str(path)

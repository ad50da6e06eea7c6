"""The examples of docs/data.md are read as the page says."""

import json
import re
from pathlib import Path

import pytest
from support.data_forms import picture

from kvcapsule.data.batches import read_question
from kvcapsule.data.formats import FORMATS
from kvcapsule.data.source import SourceConfig, load

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
EXAMPLES = dict(re.findall(r"^`([a-z-]+)`: .*?^```json\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_every_format_has_an_example() -> None:
    assert list(EXAMPLES) == list(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_an_example_is_recognised(tmp_path: Path, name: str) -> None:
    for i, letter in enumerate("abcd"):
        picture(i).save(tmp_path / f"{letter}.png")
    (tmp_path / "a.jsonl").write_text(EXAMPLES[name])
    rows = load(SourceConfig(str(tmp_path / "a.jsonl"), "all"))
    assert rows.info.description.startswith(f"read as: {name} (") and len(rows) == 3
    for i, row in enumerate(rows):
        line = json.loads(EXAMPLES[name].splitlines()[int(row["_row"].split()[1]) - 1])
        images = sum(json.dumps(line).count(f"{letter}.png") for letter in "abcd")
        assert len(read_question(row, i).images) == images

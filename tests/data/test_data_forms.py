"""Every form of data through the own code of train, eval and analyze: read as it is meant, and turned into a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from support.data_forms import COUNT, FORMS, Expected, colour

from kvcapsule.data.batches import read_question
from kvcapsule.data.source import SourceConfig, load
from kvcapsule.errors import DataError
from kvcapsule.eval.batches import batches
from kvcapsule.training.analysis.questions import Reader
from kvcapsule.training.datamodule import Questions
from kvcapsule.vlm.spans import find_spans

pytestmark = pytest.mark.usefixtures("quick_streams")

BATCH = 4


def _train(rows: datasets.Dataset, model: Any, processor: Any) -> tuple[int, int]:
    batch = next(iter(Questions(rows, rows, processor, batch=BATCH, dtype=model.dtype).val_dataloader()))
    assert (batch.answers > 0).all()
    return len(batch.answers), len(find_spans(model.config, batch.inputs["input_ids"], batch.inputs))


def _eval(rows: datasets.Dataset, model: Any, processor: Any) -> tuple[int, int]:
    batch = next(batches(rows, model, processor, BATCH))
    return len(batch.questions), len(batch.layout.spans)


def _analyze(rows: datasets.Dataset, model: Any, processor: Any) -> tuple[int, int]:
    batch = next(Reader(rows, model, processor, BATCH).batches(answers=True))
    assert all(batch.answers)
    return len(batch.answers), len(batch.spans)


COMMANDS: dict[str, Callable[..., tuple[int, int]]] = {"train": _train, "eval": _eval, "analyze": _analyze}


@pytest.fixture(scope="module", params=FORMS, ids=[name.replace(" ", "-") for name in FORMS])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[datasets.Dataset, list[Expected]]:
    options, expected = FORMS[request.param](tmp_path_factory.mktemp("form"))
    return load(SourceConfig(**{"split": "all", **options})), expected


def test_rows_are_read_as_they_are_meant(loaded: tuple[datasets.Dataset, list[Expected]]) -> None:
    rows, expected = loaded
    questions = [read_question(row, i) for i, row in enumerate(rows)]
    assert len(questions) == COUNT
    for question in questions:
        # Which row it is, its image says.
        (number,) = (i for i in range(COUNT) if question.images[0].getpixel((5, 5)) == colour(i))
        read = Expected(question.prompt, question.answers, len(question.images), question.choices)
        assert read == expected[number] and question.answer == question.answers[0]
    assert len({question.prompt for question in questions}) == COUNT


@pytest.mark.parametrize("command", COMMANDS)
def test_a_batch(loaded: tuple[datasets.Dataset, list[Expected]], command: str, model: Any, processor: Any) -> None:
    rows, expected = loaded
    assert COMMANDS[command](rows, model, processor) == (BATCH, BATCH * expected[0].images)


def test_the_line_says_how_rows_were_read(loaded: tuple[datasets.Dataset, list[Expected]]) -> None:
    line = loaded[0].info.description
    assert line.startswith("read as: ") and "images" in line and f"{COUNT} of {COUNT} rows" in line and "\n" not in line


def test_a_folder_of_the_same_name_need_not_exist(tmp_path: Path) -> None:
    """What is missing is said before what the Hub says of such a name."""
    for name in ("nothing", "nothing.jsonl"):
        with pytest.raises(
            DataError, match=f"cannot load data from .*: there is no file or folder {tmp_path / name}, and"
        ):
            load(SourceConfig(source=str(tmp_path / name)))

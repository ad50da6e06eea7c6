"""The digest of a question: of its pixels and its prompt, wherever they come from."""

from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from kvcapsule.data.batches import Question, read_question
from kvcapsule.data.row_digest import row_digest
from kvcapsule.testbeds.pages import page, pages


def of_row(image: object, prompt: str = "What?") -> int:
    return row_digest(read_question({"image": image, "prompt": prompt, "answer": "x", "task": "t"}, 0))


def test_a_picture_is_the_same_from_a_file_from_bytes_and_in_memory(tmp_path: Path) -> None:
    image = page("test", 0).image
    image.save(tmp_path / "page.png")
    buffer = BytesIO()
    image.save(buffer, "BMP")
    digests = {
        of_row(image),
        of_row([image]),
        of_row({"path": str(tmp_path / "page.png"), "bytes": None}),
        of_row({"path": None, "bytes": buffer.getvalue()}),
    }
    assert len(digests) == 1 and -(2**63) <= digests.pop() < 2**63


def test_whatever_is_asked_counts_and_the_answer_does_not() -> None:
    image = page("test", 0).image
    dot = image.copy()
    dot.putpixel((3, 4), (1, 2, 3))
    wide = Image.frombytes("RGB", (image.height * 2, image.width // 2), image.tobytes())
    images = [[image], [dot], [wide], [image, dot], [dot, image], []]
    assert len({row_digest(Question(i, "What?", "a", "", ("a",))) for i in images}) == len(images)
    assert of_row(image, "Why?") != of_row(image)
    assert row_digest(Question([image], "What?", "b", "other", ("b", "c"))) == of_row(image)


def test_pages_have_digests_of_their_own_in_each_split() -> None:
    splits = [{row_digest(read_question(row, 0)) for row in pages(split, 40)} for split in ("train", "test")]
    assert [len(split) for split in splits] == [40, 40] and not splits[0] & splits[1]


@pytest.mark.parametrize("prompt", ["\ud800", "ä", ""])
def test_any_text_has_one(prompt: str) -> None:
    row_digest(Question([], prompt, "", "", ("",)))

"""The pages task: deterministic, split without overlap, its questions answered by its pages."""

import re

import numpy as np
import pytest

from kvcapsule.testbeds.digits import digit_scans
from kvcapsule.testbeds.pages import COUNTS, LINES, SIDE, TASKS, WORDS, page, pages, questions


def test_a_page_is_a_function_of_its_arguments() -> None:
    first, again = page("test", 5), page("test", 5)
    assert first.lines == again.lines and np.array_equal(first.image, again.image)
    others = [page("test", 6), page("test", 5, seed=1), page("train", 5)]
    assert all(not np.array_equal(first.image, other.image) for other in others)


def test_no_scan_is_in_two_splits() -> None:
    seen: dict[bytes, str] = {}
    for split in ("train", "validation", "test"):
        for scans in digit_scans(split):
            for scan in scans:
                assert seen.setdefault(scan.tobytes(), split) == split
    assert len(seen) > 1700
    with pytest.raises(ValueError, match="train, validation, test"):
        digit_scans("dev")


def test_marks_lie_on_ink_and_in_reading_order() -> None:
    for index in range(20):
        drawn = page("validation", index)
        assert LINES[0] <= len(drawn.lines) <= LINES[1]
        ink = np.asarray(drawn.image.convert("L"), float)
        for mark in drawn.marks:
            assert 0 <= mark.x < SIDE and 0 <= mark.y < SIDE
            near = ink[max(0, int(mark.y) - 5) : int(mark.y) + 6, max(0, int(mark.x) - 5) : int(mark.x) + 6]
            assert near.min() < np.median(ink) - 30
        assert "".join(m.text for m in drawn.marks) == "".join(word + number for word, number in drawn.lines)
        # Eight pixels are a patch of the demo VLM: no two symbols may share one.
        assert len({(int(m.x // 8), int(m.y // 8)) for m in drawn.marks}) == len(drawn.marks)


def test_layout_varies() -> None:
    tops = {round(page("train", i).marks[0].y) for i in range(40)}
    lefts = {round(page("train", i).marks[0].x) for i in range(40)}
    assert len(tops) > 12 and len(lefts) > 12


def test_answers_follow_from_the_page() -> None:
    drawn = page("test", 3)
    asked = {q.task: q for q in questions(drawn, np.random.default_rng(0))}
    lines = [f"{word} {number}" for word, number in drawn.lines]
    assert tuple(asked) == TASKS
    assert asked["transcribe"].answer == "\n".join(lines)
    assert asked["line"].answer == lines[int(asked["line"].prompt.removeprefix("Read line ").removesuffix(".")) - 1]


def test_a_look_up_reads_words_down_to_the_key_and_then_its_number() -> None:
    for i in range(30):
        drawn = page("test", i)
        (asked,) = questions(drawn, np.random.default_rng(i), ("lookup",))
        words = [word for word, _ in drawn.lines]
        row = words.index(str(asked.key))
        assert asked.prompt == f"What stands beside {asked.key}?"
        assert asked.answer == "\n".join(words[: row + 1]) + " " + drawn.lines[row][1]


def test_a_count_is_a_tally_of_a_digit_that_stands_there_two_to_four_times() -> None:
    found = []
    for i in range(200):
        drawn = page("test", i)
        (asked,) = questions(drawn, np.random.default_rng(i), ("count",))
        numbers = "\n".join(number for _, number in drawn.lines)
        tally, right = asked.answer.rsplit("\n", 1)
        assert asked.prompt == f"How many {asked.key}s?"
        assert re.sub(r"\(\d\)", "", tally) == numbers
        assert int(right) == numbers.count(str(asked.key)) > 0
        assert re.findall(r"(\d)\((\d)\)", tally) == [(asked.key, str(n + 1)) for n in range(int(right))]
        found.append(int(right))
    assert sum(n in COUNTS for n in found) >= 190 and set(COUNTS) <= set(found)


def test_the_data_set_takes_the_tasks_in_turn() -> None:
    rows = pages("test", 6, tasks=("line", "lookup"))
    assert rows["task"] == ["line", "lookup"] * 3
    assert rows.column_names == ["image", "prompt", "answer", "task"]
    assert rows[0]["image"].size == (SIDE, SIDE)
    assert pages("test", 8, tasks=("line", "lookup"))["answer"][:6] == rows["answer"]
    with pytest.raises(ValueError, match="unknown tasks"):
        pages("test", 2, tasks=("spell",))
    assert all(word.isalpha() for word in WORDS)

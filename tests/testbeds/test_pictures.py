"""Emoji scenes, easy-VQA and words to read: deterministic, their questions answered by their pictures, splits apart."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from support.tiny_smol import backgrounds, glyph

from kvcapsule.data.source import SourceConfig, load
from kvcapsule.errors import DataError
from kvcapsule.testbeds import easy_vqa, emoji, photos, words
from kvcapsule.testbeds.pages import Question
from kvcapsule.testbeds.picture import data_set, generator, prior_accuracy


def _scene(split: str, index: int, seed: int = 0):
    return emoji.compose(generator(split, index, seed, 1), backgrounds(), glyph)


def test_names_are_unicodes_and_short() -> None:
    assert len(set(emoji.NAMES.values())) == len(emoji.NAMES) == len(emoji.CHARACTERS) >= 100
    assert emoji.NAMES["🐧"] == "penguin" and emoji.NAMES["⚽"] == "soccer ball"
    assert all(1 <= len(name.split()) <= 2 and name == name.lower() for name in emoji.NAMES.values())


def test_a_scenes_answers_follow_from_where_things_lie() -> None:
    totals = set()
    for index in range(60):
        found = _scene("test", index)
        totals.add(len(found.things))
        cells = [
            (int((t.top + t.bottom) / 2 * 3 // emoji.SIDE), int((t.left + t.right) / 2 * 3 // emoji.SIDE))
            for t in found.things
        ]
        assert cells == sorted(set(cells))
        assert all(0 <= t.left < t.right <= emoji.SIDE and 0 <= t.top < t.bottom <= emoji.SIDE for t in found.things)
        names = [t.name for t in found.things]
        at = {emoji.PLACES[row * 3 + column]: name for (row, column), name in zip(cells, names, strict=True)}
        by_task = {task: {q.prompt: q.answer for q in found.questions if q.task == task} for task in emoji.TASKS}
        assert by_task["place"] == {f"What is at the {place}?": name for place, name in at.items()}
        counts = Counter(names)
        numbers = {prompt.split(": ")[1].rstrip("?"): int(answer) for prompt, answer in by_task["number"].items()}
        assert all(numbers[name] == counts[name] for name in numbers) and set(counts) < set(numbers)
        assert list(by_task["list"].values()) == [", ".join(names)]
    assert totals == set(range(1, 10))


def test_an_emoji_is_drawn_where_it_is_said_to_be() -> None:
    found = _scene("train", 4)
    plain = emoji.compose(generator("train", 4, 0, 1), backgrounds(), lambda _: Image.new("RGBA", (40, 30)))
    changed = np.abs(np.asarray(found.image, int) - np.asarray(plain.image, int)).sum(-1) > 0
    inside = np.zeros_like(changed)
    for thing in found.things:
        box = slice(int(thing.top), int(thing.bottom)), slice(int(thing.left), int(thing.right))
        inside[box] = True
        assert changed[box].mean() > 0.3
    assert not changed[~inside].any()


@pytest.mark.parametrize(
    "draw", [_scene, lambda split, i, seed=0: words.compose(generator(split, i, seed, 4), backgrounds())]
)
def test_a_picture_is_a_function_of_its_arguments(draw) -> None:
    first, again = draw("test", 5), draw("test", 5)
    assert first.questions == again.questions and np.array_equal(first.image, again.image)
    for other in (draw("test", 6), draw("train", 5), draw("test", 5, 1)):
        assert not np.array_equal(first.image, other.image)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        draw("dev", 0)


def test_words_are_read_from_top_to_bottom_and_lie_on_the_picture() -> None:
    lengths = set()
    for index in range(40):
        found = words.compose(generator("test", index, 0, 4), backgrounds())
        shown = [t.name for t in sorted(found.things, key=lambda t: t.top)]
        lengths.add(len(shown))
        assert all(
            t.left >= 0 and t.right <= words.SIDE and t.top >= 0 and t.bottom <= words.SIDE for t in found.things
        )
        assert all(a.bottom <= b.top for a, b in zip(found.things, found.things[1:], strict=False))
        by_task = {task: [q for q in found.questions if q.task == task] for task in words.TASKS}
        assert [q.answer for q in by_task["read"]] == ["\n".join(shown)]
        assert [q.answer for q in by_task["line"]] == shown
    assert lengths == {1, 2, 3, 4}
    assert len(set(words.WORDS)) == len(words.WORDS) > 100


def test_no_photograph_is_in_two_splits() -> None:
    named = [name for split in photos.PHOTOS.values() for name in split]
    assert len(set(named)) == len(named)
    with pytest.raises(ValueError, match="unknown split"):
        photos.photos("dev")


def _easy_vqa(folder) -> None:
    """30 training and 6 test pictures: a blue square whose place is the picture's number; test picture 5 is training
    picture 7 again."""
    for part, size in (("train", 30), ("test", 6)):
        (folder / part / "images").mkdir(parents=True)
        asked = []
        for number in range(size):
            pixels = np.full((64, 64, 3), 240, np.uint8)
            at = 7 if (part, number) == ("test", 5) else number + (30 if part == "test" else 0)
            pixels[10:20, at : at + 10] = (0, 0, 255)
            Image.fromarray(pixels).save(folder / part / "images" / f"{number}.png")
            asked += [["what is the blue shape?", "rectangle", number], ["is there a circle?", "no", number]]
        (folder / part / "questions.json").write_text(json.dumps(asked))


def test_easy_vqas_splits_share_no_picture(tmp_path) -> None:
    _easy_vqa(tmp_path)
    found = {split: easy_vqa.read(tmp_path, split) for split in ("train", "validation", "test")}
    assert {split: len(pictures) for split, pictures in found.items()} == {"train": 27, "validation": 3, "test": 5}
    pixels = [p.image.tobytes() for pictures in found.values() for p in pictures]
    assert len(set(pixels)) == len(pixels) == 35
    (thing,) = found["test"][2].things
    assert thing == type(thing)("blue rectangle", 32, 10, 42, 20)
    assert [q.task for q in found["test"][2].questions] == ["open", "yesno"]
    with pytest.raises(ValueError, match="unknown split"):
        easy_vqa.read(tmp_path, "dev")


def test_a_data_set_takes_the_tasks_in_turn() -> None:
    rows = data_set(_scene, "test", 6, 0, ("place", "list"))
    assert rows["task"] == ["place", "list"] * 3 and rows.column_names == ["image", "prompt", "answer", "task"]
    assert data_set(_scene, "test", 4, 0, ("place", "list"))["answer"] == rows["answer"][:4]
    for index, row in enumerate(rows):
        assert Question(row["task"], row["prompt"], row["answer"]) in _scene("test", index).questions


def test_prior_accuracy_is_that_of_one_who_never_looks() -> None:
    def row(prompt: str, answer: str, task: str = "t") -> dict[str, str]:
        return {"prompt": prompt, "answer": answer, "task": task}

    known = [
        row("a?", "x"),
        row("a?", "x"),
        row("a?", "y"),
        row("b?", "z"),
        row("b?", "z"),
        row("b?", "z"),
        row("c?", "1", "u"),
    ]
    asked = [
        row("a?", "x"),
        row("a?", "y"),
        row("new?", "z"),
        row("b?", "x"),
        row("new?", "1", "u"),
        row("new?", "1", "v"),
    ]
    assert prior_accuracy(known, asked) == {"t": 0.5, "u": 1.0, "v": 0.0}


def test_sources_are_known_by_name(monkeypatch) -> None:
    from kvcapsule.data import source

    def draws(name):
        return lambda split, size, seed: data_set(_scene, split, size, seed, ("place",)).map(lambda row: {"task": name})

    monkeypatch.setattr(source, "PICTURES", {name: draws(name) for name in source.PICTURES})
    assert load(SourceConfig("emoji", "test", 2))["task"] == ["emoji"] * 2
    mixed = load(SourceConfig("pictures", "test", 7))
    assert mixed["task"] == ["emoji-emoji", "easy-vqa-easy-vqa", "words-words"] * 2 + ["emoji-emoji"]
    assert mixed.column_names == ["image", "prompt", "answer", "task"] and mixed[0]["image"].size == (
        emoji.SIDE,
        emoji.SIDE,
    )
    with pytest.raises(DataError, match="has no split 'dev'"):
        load(SourceConfig("words", "dev"))

"""Rows of a user's own data: which are used, how they are counted, and what is refused, before anything runs."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from support.data_forms import beside, picture, png, write_csv, write_json

from kvcapsule.data.batches import ROW, read_question
from kvcapsule.data.source import SourceConfig, is_built_in, load
from kvcapsule.errors import DataError
from kvcapsule.eval.eval_config import EvalConfig
from kvcapsule.training.analysis.config import AnalyzeConfig
from kvcapsule.training.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_streams")

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(3, answer="x"): a .jsonl of three rows beside their images; values that are lists are one a row."""

    def build(count: int, name: str = "own.jsonl", **columns: Any) -> str:
        rows = [{"image": beside(tmp_path, i), "prompt": f"What {i}?", "answer": "no"} for i in range(count)]
        for column, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                row[column] = value
        return write_json(tmp_path / name, rows)

    return build


def asked(pictures: Sequence[int]) -> datasets.Dataset:
    """A question about each of these pictures."""
    prompts = [f"What {i}?" for i in range(len(pictures))]
    rows = {"image": [*map(picture, pictures)], "prompt": prompts, "answer": ["no"] * len(prompts)}
    return datasets.Dataset.from_dict(rows)


def refused(source: str, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        rows = load(SourceConfig(source=source, **{"split": "all", **options}))
        for i, row in enumerate(rows):
            read_question(row, i)
    line = str(error.value)
    assert "\n" not in line
    return line


def images(rows: datasets.Dataset) -> set[bytes]:
    return {image.tobytes() for i, row in enumerate(rows) for image in read_question(row, i).images}


def test_eval_never_sees_what_train_sees(tmp_path: Path, write: Write) -> None:
    """With the defaults of the commands, whatever the order and the names of files; analyze sees what train sees."""
    source = write(40)
    for i in range(40):
        # Every second picture is there once more, under another name.
        shutil.copy(tmp_path / "pictures" / f"{i // 2 * 2}.png", tmp_path / f"{i}.png")
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    rows += [{**row, "image": f"{i}.png"} for i, row in enumerate(rows)]
    write_json(Path(source), rows)
    train, test, analyze = (
        load(SourceConfig(source, config.data.split)) for config in (Recipe(), EvalConfig(), AnalyzeConfig())
    )
    assert len(train) + len(test) == 80 and 0 < len(test) <= 20
    assert not images(train) & images(test)
    assert images(train) == images(analyze)
    assert "90 to 100 % of the images, by content; --data.split all has every row" in test.info.description


def test_a_folder_without_splits_is_shared_as_a_file_is(tmp_path: Path) -> None:
    rows = asked(range(12))
    rows.save_to_disk(str(tmp_path / "a"))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "b"))
    datasets.DatasetDict({"train": rows, "dev": rows}).save_to_disk(str(tmp_path / "c"))
    for name in ("a", "b"):
        sizes = [len(load(SourceConfig(str(tmp_path / name), split))) for split in ("train", "test", "all")]
        assert sizes == [11, 1, 12]
        assert "has no split 'nonsense'" in refused(str(tmp_path / name), split="nonsense")
    assert "has no split 'test'; it has train, dev, and shares such as" in refused(str(tmp_path / "c"), split="test")
    assert len(load(SourceConfig(source=str(tmp_path / "c"), split="train"))) == 12
    assert len(load(SourceConfig(source=str(tmp_path / "c"), split="dev[:50%]"))) == 6


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is missing"),
        ("", "is empty"),
        (" \n", "is empty"),
        (["4", "four"], "list"),
        ({"text": "four"}, "object"),
        (4.5, "a number with decimals"),
        (True, "true or false"),
        ("a \ud800", "half of a surrogate pair at character 3"),
    ],
)
@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_what_is_no_text_is_refused(write: Write, column: str, value: Any, says: str) -> None:
    source = write(20, **{column: [value if i == 13 else "fine" for i in range(20)]})
    line = refused(source)
    assert line.startswith("line 14 of own.jsonl: ") and column in line and says in line


def test_whole_numbers_are_their_digits_and_texts_stay_what_they_are(write: Write, tmp_path: Path) -> None:
    answers = [4, "4.0", "2020-01-01", "null", "NA"]
    rows = load(SourceConfig(source=write(5, answer=answers), split="all"))
    assert sorted(rows["answer"]) == sorted(["4", "4.0", "2020-01-01", "null", "NA"])
    values = [
        {"image": beside(tmp_path, i), "prompt": "What?", "answer": text} for i, text in enumerate(map(str, answers))
    ]
    rows = load(SourceConfig(source=write_csv(tmp_path / "a.csv", values), split="all"))
    assert sorted(rows["answer"]) == sorted(["4", "4.0", "2020-01-01", "null", "NA"])


def test_a_missing_key_is_a_missing_answer(write: Write) -> None:
    source = write(3)
    path = Path(source)
    path.write_text(path.read_text().replace(', "answer": "no"', "", 1))
    assert refused(source) == "line 1 of own.jsonl: the answer is missing, expected text."


def test_rows_are_counted_as_the_user_counts_them(write: Write, tmp_path: Path) -> None:
    """By lines, empty ones too; before the shuffle."""
    path = Path(write(20))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "", *lines[1:]]))
    rows = load(SourceConfig(source=str(path), split="all"))
    for row in rows:
        number = int(row["prompt"].removeprefix("What ").removesuffix("?"))
        assert row[ROW] == f"line {number + 1 if number == 0 else number + 2} of own.jsonl"
    assert rows[0]["prompt"] != "What 0?"
    (tmp_path / "pictures" / "7.png").write_bytes(png(7)[:60])
    assert refused(str(path)).startswith("line 9 of own.jsonl: ")
    assert refused(write(20, "own.json", answer=[None if i == 5 else "no" for i in range(20)])).startswith(
        "row 6 of own.json: "
    )
    values = [
        {"image": f"pictures/{i}.png", "prompt": "two\nlines", "answer": "" if i == 2 else "no"} for i in range(5)
    ]
    assert refused(write_csv(tmp_path / "a.csv", values)).startswith("line 7 of a.csv: ")


def test_broken_rows_are_left_out_if_wanted(write: Write, tmp_path: Path) -> None:
    source = write(12, answer=[None if i == 3 else "no" for i in range(12)])
    (tmp_path / "pictures" / "5.png").write_bytes(png(5)[:60])
    (tmp_path / "pictures" / "8.png").unlink()
    rows = load(SourceConfig(source=source, split="all", skip_broken=True))
    assert {row["prompt"] for row in rows} == {f"What {i}?" for i in range(12) if i not in (3, 5, 8)}
    assert "9 of 12 rows, 3 broken left out: line 4 of own.jsonl: the answer is missing" in rows.info.description
    assert refused(write(2, answer=[None, None]), skip_broken=True).startswith(
        f"{source}: no row can be read; the first: line 1"
    )


def test_images_lie_beside_the_file_or_in_the_working_directory(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(3)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "images beside the file," in load(SourceConfig(source=source)).info.description
    shutil.move(tmp_path / "pictures", tmp_path / "here" / "pictures")
    assert "images in the working directory," in load(SourceConfig(source=source)).info.description
    shutil.rmtree(tmp_path / "here" / "pictures")
    line = refused(source)
    assert line.startswith("line 1 of own.jsonl: there is no image pictures/0.png, beside the data (")
    assert line.endswith("or in the working directory.")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("https://example.org/a.png", "is a URL: download it first"),
        (5, "the image column holds int"),
        (None, "the image is missing"),
        ([], "there is no image"),
        ("Qk" + "0" * 5_000, "it is no base64 of a PNG"),
        ("a\0b.png", "there is no image"),
        ("data:image/png;base64,%%%", "no sound base64"),
    ],
)
def test_what_is_no_image_is_refused(write: Write, image: Any, says: str) -> None:
    line = refused(write(4, image=["pictures/0.png", image, "pictures/2.png", "pictures/3.png"]))
    assert line.startswith("line 2 of own.jsonl: ") and says in line


def test_as_many_places_as_images(write: Write) -> None:
    line = refused(write(2, prompt=["What?", "Is <image> like <image>?"]))
    assert line == "line 2 of own.jsonl: the prompt has 2 places <image>, but there are 1 images."


def test_one_column_under_two_names(write: Write) -> None:
    both = {"prompt": "conversations", "answer": "conversations"}
    assert refused(write(2), **both).startswith("--data.prompt and --data.answer both name the column 'conversations'")
    line = refused(write(2), image="prompt", prompt="prompt")
    assert line.startswith("--data.image and --data.prompt both name the column 'prompt'")


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([], "an empty list"),
        ("What?", "expected a list of turns"),
        ([{"role": "assistant", "content": "no"}], "the turns in messages are by assistant: expected a user's turn"),
        ([{"role": "user", "content": "What?"}], "expected a user's turn (human, user) and then the answer"),
        ([{"role": "user", "content": "What?"}, {"role": "assistant", "tool_calls": 1}], "the answer is missing"),
        ([{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant"}], "neither text nor image"),
        ([{"role": "user", "content": ["What?"]}, {"role": "assistant"}], "neither text nor image"),
        ({"role": ["user", "assistant"], "content": ["What?"]}, "lists of several lengths"),
    ],
)
def test_turns_without_question_and_answer(write: Write, turns: Any, says: str) -> None:
    fine = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "no"}]
    line = refused(write(2, messages=[fine, turns]), format="messages")
    assert line.startswith("line 2 of own.jsonl: ") and says in line


def test_turns_are_no_prompt(write: Write) -> None:
    turns = [[{"from": "human", "value": "What?"}, {"from": "gpt", "value": "no"}]] * 2
    source = write(2, conversations=turns)
    assert "line 1 of own.jsonl: the prompt is a list" in refused(source, prompt="conversations")
    rows = load(SourceConfig(source=source, format="llava"))
    assert rows[0]["prompt"] == "What?"


def test_formats_are_named_where_none_fits(write: Write) -> None:
    source = write(2)
    line = refused(source, prompt="text")
    assert "has no column 'text'; it has image, prompt, answer." in line
    for name in ("question-answer", "question-answers", "multiple-choice", "llava", "messages", "cauldron"):
        assert f"{name}: " in line
        if name.startswith("question"):
            assert f"read as: {name} " in load(SourceConfig(source=source, format=name)).info.description
        else:
            assert f"is not of the format {name} (" in refused(source, format=name)
    assert "--data.format csv: choose one of " in refused(source, format="csv")


@pytest.mark.parametrize(
    ("options", "answer", "right"),
    [
        (["a", "b"], 1, "B"),
        (["a", "b"], "1", "B"),
        (["a", "b"], "(b).", "B"),
        (["cat", "dog"], "dog", "B"),
        (["1", "2", "3"], "3", None),
        (["1", "2", "3"], "2", None),
        (["3", "1", "2"], 1, "B"),
        (["a", "b"], 2, None),
        (["a", "b"], "C", None),
        (["a", "b"], -1, None),
        (["B", "A"], "B", None),
    ],
)
def test_the_right_option(write: Write, options: list[str], answer: Any, right: str | None) -> None:
    """An answer that may mean two options is refused: "3" is the text of the third one and no index."""
    source = write(2, options=[options] * 2, answer=[answer] * 2)
    if right is None and not (options == ["1", "2", "3"] and answer == "3"):
        assert "line 1 of own.jsonl: the answer " in (line := refused(source)) and "give a letter" in line
    else:
        assert set(load(SourceConfig(source=source))["answer"]) == {right or "C"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "", "holds no rows"),
        ("a.csv", "image,prompt,answer\n", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.jsonl", '{"image": 1}\n{"image": ', "line 2 of a.jsonl is no JSON"),
        ("a.jsonl", '{"image": 1}\n[1]', "line 2 of a.jsonl is of type list, expected an object"),
        ("a.json", "[" * 100_000, "a.json is no JSON"),
        ("a.csv", "image,image\n1,2", "two columns of one name"),
        ("a.csv", "image,prompt\n1,2,3", "line 2 of a.csv has more values"),
        ("a.parquet", "no parquet", "cannot load data from"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("a.txt", "x", "data files end in .json, .jsonl, .csv, .tsv, .parquet"),
    ],
)
def test_files_that_are_no_data(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refused(str(tmp_path / name))


@pytest.mark.parametrize("source", ["", " ", "x" * 5_000, "no/such/thing", "a\0b"])
def test_what_is_no_source(source: str) -> None:
    assert "--data.source is empty" in (line := refused(source)) or (
        "cannot load data from" in line and "there is no file or folder" in line
    )


def test_subsets_and_streams(tmp_path: Path, write: Write) -> None:
    source = write(2)
    assert "is a file, which has no subsets" in refused(source, subset="easy")
    assert "has no splits, and a share of its images is known" in refused(source, streaming=True, split="train")
    assert "--data.streaming has no shares such as train" in refused(str(tmp_path), streaming=True, split="train[:50%]")
    assert "--data.format is for other data: pages is built in" in refused("pages", split="test", format="llava")


def test_two_folders_of_one_name(tmp_path: Path) -> None:
    """`datasets` keeps what it read of a folder with a README.md under the folder's name alone."""
    for parent, pictures in (("one", range(2)), ("two", range(2, 5))):
        folder = tmp_path / parent / "folder-of-one-name"
        folder.mkdir(parents=True)
        asked(pictures).to_parquet(str(folder / "a.parquet"))
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: easy\n  data_files:\n  - split: train\n    path: a.parquet\n---\n"
        )
        assert len(load(SourceConfig(str(folder), "all", subset="easy"))) == len(pictures)


def test_a_stream_stops_at_size(tmp_path: Path) -> None:
    asked([i % 12 for i in range(60)]).to_parquet(str(tmp_path / "train.parquet"))
    source = SourceConfig(str(tmp_path), "all", size=7, streaming=True)
    drawn = [load(replace(source, seed=seed))["prompt"][:] for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 7 and drawn[0] == drawn[1] != drawn[2]
    labels = load(replace(source, size=3))[ROW][:]
    assert {label.split(" of ")[0] for label in labels} == {"row 1", "row 2", "row 3"}


def test_seeds_choose_rows_and_their_order(write: Write) -> None:
    source = write(12)
    drawn = [load(SourceConfig(source, "all", size=6, seed=seed))["prompt"][:] for seed in (0, 0, 1)]
    assert len(set(drawn[0])) == 6 and drawn[0] == drawn[1] != drawn[2]


def test_tasks(write: Write) -> None:
    rows = load(SourceConfig(write(4, task=["count", "count", 3, None]), "all"))
    assert sorted(rows["task"]) == ["3", "count", "count", "own"]
    assert "the task is a list" in refused(write(2, task=[["a"], "b"]))


def test_what_is_built_in(write: Write) -> None:
    for name in ("pages", "pages-short", "emoji", "easy-vqa", "words", "pictures"):
        assert is_built_in(name)
    assert not is_built_in(write(1)) and not is_built_in("lmms-lab/DocVQA")


def test_upright_in_the_data_set_too(tmp_path: Path) -> None:
    """`datasets` decodes nothing: the reader does."""
    image = Image.new("RGB", (16, 8), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    source = write_json(tmp_path / "a.jsonl", [{"image": "a.png", "prompt": "What?", "answer": "no"}])
    (question,) = [read_question(row, i) for i, row in enumerate(load(SourceConfig(source, "all")))]
    assert question.images[0].size == (8, 16)

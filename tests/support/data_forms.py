"""Small data sets in every form that is understood, each with the questions that should be read of it."""

import base64
import csv
import json
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from PIL import Image

COUNT = 10
"""Rows of a form."""
Row = dict[str, Any]


class Expected(NamedTuple):
    """What a row should be read as."""

    prompt: str
    answers: tuple[str, ...]
    images: int = 1
    choices: tuple[str, ...] = ()


def colour(row: int) -> tuple[int, int, int]:
    return 5 * row, 7, 99


def picture(row: int) -> Image.Image:
    return Image.new("RGB", (112, 112), colour(row))


def png(row: int) -> bytes:
    file = BytesIO()
    picture(row).save(file, "PNG")
    return file.getvalue()


def write_json(path: Path, rows: Sequence[Any]) -> str:
    """As a line each in a .jsonl, else as a list."""
    lines = "\n".join(json.dumps(row) for row in rows)
    path.write_text(lines if path.suffix == ".jsonl" else json.dumps(rows, indent=1))
    return str(path)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], separator: str = ",") -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def beside(folder: Path, row: int) -> str:
    """The name of a picture in the folder."""
    (folder / "pictures").mkdir(exist_ok=True)
    picture(row).save(folder / "pictures" / f"{row}.png")
    return f"pictures/{row}.png"


def _plain(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [{"image": beside(folder, i), "question": f"What {i}?", "answer": i} for i in range(COUNT)]
    return {"source": write_json(folder / "a.jsonl", rows)}, [Expected(f"What {i}?", (str(i),)) for i in range(COUNT)]


def _answers(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [{"image": beside(folder, i), "query": f"What {i}?", "answers": [f"{i}", "no", "no"]} for i in range(COUNT)]
    expected = [Expected(f"What {i}?", (f"{i}", "no", "no")) for i in range(COUNT)]
    return {"source": write_json(folder / "a.json", rows)}, expected


def _vqa(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [
        {
            "image": beside(folder, i),
            "text": f"What {i}?",
            "votes": [{"answer": "red", "id": 1}, {"answer": "no", "id": 2}],
        }
        for i in range(COUNT)
    ]
    options = {"prompt": "text", "answer": "votes"}
    source = write_json(folder / "a.jsonl", rows)
    return {"source": source, **options}, [Expected(f"What {i}?", ("red", "no")) for i in range(COUNT)]


def _csv(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [{"image": beside(folder, i), "prompt": f"What, {i}?", "answer": f"0{i}.0"} for i in range(COUNT)]
    return {"source": write_csv(folder / "a.csv", rows)}, [Expected(f"What, {i}?", (f"0{i}.0",)) for i in range(COUNT)]


def _lettered_tsv(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [
        {
            "image": base64.b64encode(png(i)).decode(),
            "question": f"Which {i}?",
            "A": "one",
            "B": "two",
            "C": "",
            "answer": "AB"[i % 2],
        }
        for i in range(COUNT)
    ]
    asked = "Which {}?\nA. one\nB. two\nAnswer with the option's letter."
    expected = [Expected(asked.format(i), ("AB"[i % 2],), choices=("one", "two")) for i in range(COUNT)]
    return {"source": write_csv(folder / "a.tsv", rows, "\t")}, expected


def _choices(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [
        {"image": beside(folder, i), "question": f"Which {i}?", "choices": ["red", "no"], "answer": i % 2}
        for i in range(COUNT)
    ]
    asked = "Which {}?\nA. red\nB. no\nAnswer with the option's letter."
    expected = [Expected(asked.format(i), ("AB"[i % 2],), choices=("red", "no")) for i in range(COUNT)]
    return {"source": write_json(folder / "a.jsonl", rows)}, expected


def _parquet(folder: Path) -> tuple[Row, list[Expected]]:
    rows = {"image": [picture(i) for i in range(COUNT)], "prompt": [f"What {i}?" for i in range(COUNT)], "answer": "no"}
    rows["answer"] = ["no"] * COUNT
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}, [Expected(f"What {i}?", ("no",)) for i in range(COUNT)]


def _parquet_bytes(folder: Path) -> tuple[Row, list[Expected]]:
    rows = {"image": [png(i) for i in range(COUNT)], "prompt": [f"What {i}?" for i in range(COUNT)]}
    datasets.Dataset.from_dict({**rows, "answer": ["no"] * COUNT}).to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}, [Expected(f"What {i}?", ("no",)) for i in range(COUNT)]


def _parquet_paths(folder: Path) -> tuple[Row, list[Expected]]:
    rows = {"image": [beside(folder, i) for i in range(COUNT)], "prompt": [f"What {i}?" for i in range(COUNT)]}
    datasets.Dataset.from_dict({**rows, "answer": ["no"] * COUNT}).to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}, [Expected(f"What {i}?", ("no",)) for i in range(COUNT)]


def _llava(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [
        {
            "id": i,
            "image": beside(folder, i),
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat {i}?"},
                {"from": "gpt", "value": "red"},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": "no"},
            ],
        }
        for i in range(COUNT)
    ]
    source = write_json(folder / "a.json", rows)
    return {"source": source}, [Expected(f"What {i}?", ("red",)) for i in range(COUNT)]


def _llava_several(folder: Path) -> tuple[Row, list[Expected]]:
    rows = [
        {
            "images": [beside(folder, i), beside(folder, (i + 1) % COUNT)],
            "conversations": [
                {"from": "human", "value": f"Is <image> like <image> {i}?"},
                {"from": "gpt", "value": "no"},
            ],
        }
        for i in range(COUNT)
    ]
    source = write_json(folder / "a.jsonl", rows)
    return {"source": source}, [Expected(f"Is <image> like <image> {i}?", ("no",), images=2) for i in range(COUNT)]


def _cauldron(folder: Path) -> tuple[Row, list[Expected]]:
    texts = [[{"user": f"What {i}?", "assistant": "red", "source": "vqa"}] * (1 + i % 2) for i in range(COUNT)]
    images = [[picture(i)] for i in range(COUNT)]
    datasets.Dataset.from_dict({"images": images, "texts": texts}).save_to_disk(str(folder / "a"))
    return {"source": str(folder / "a")}, [Expected(f"What {i}?", ("red",)) for i in range(COUNT)]


def _messages(folder: Path) -> tuple[Row, list[Expected]]:
    def content(i: int) -> list[Row]:
        return [
            {"type": "text", "text": "First"},
            {"type": "image", "path": beside(folder, i)},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(png(i)).decode()}},
            {"type": "text", "text": f"what {i}?"},
        ]

    rows = [
        {"messages": [{"role": "user", "content": content(i)}, {"role": "assistant", "content": "no"}]}
        for i in range(COUNT)
    ]
    asked = "First\n<image>\n<image>\nwhat {}?"
    source = write_json(folder / "a.jsonl", rows)
    return {"source": source}, [Expected(asked.format(i), ("no",), images=2) for i in range(COUNT)]


def _messages_parquet(folder: Path) -> tuple[Row, list[Expected]]:
    chats = [
        [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": f"What {i}?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
        ]
        for i in range(COUNT)
    ]
    rows = {"messages": chats, "images": [[picture(i)] for i in range(COUNT)]}
    datasets.Dataset.from_dict(rows).to_parquet(str(folder / "a.parquet"))
    return {"source": str(folder / "a.parquet")}, [Expected(f"What {i}?", ("no",)) for i in range(COUNT)]


def _image_folder(folder: Path) -> tuple[Row, list[Expected]]:
    for i in range(COUNT):
        picture(i).save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "question": f"What {i}?", "answer": "no"} for i in range(COUNT)]
    write_json(folder / "metadata.jsonl", rows)
    return {"source": str(folder)}, [Expected(f"What {i}?", ("no",)) for i in range(COUNT)]


def _mmmu(folder: Path) -> tuple[Row, list[Expected]]:
    """A DatasetDict with numbered images, lists as Python text, and an open question."""
    rows = {
        "question": [f"Is <image 1> like <image 2> {i}?" for i in range(COUNT)],
        "options": ["[]" if i == 0 else "['red', 'it\\'s']" for i in range(COUNT)],
        "answer": ["no" if i == 0 else "B" for i in range(COUNT)],
        "image_1": [picture(i) for i in range(COUNT)],
        "image_2": [picture((i + 1) % COUNT) for i in range(COUNT)],
        "image_3": [None] * COUNT,
    }
    features = {name: datasets.Image() if "image" in name else datasets.Value("string") for name in rows}
    split = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    datasets.DatasetDict({"dev": split, "validation": split}).save_to_disk(str(folder / "a"))
    asked = "Is <image> like <image> {}?\nA. red\nB. it's\nAnswer with the option's letter."
    expected = [Expected(asked.format(i), ("B",), 2, ("red", "it's")) for i in range(COUNT)]
    expected[0] = Expected("Is <image> like <image> 0?", ("no",), 2)
    return {"source": str(folder / "a"), "split": "validation"}, expected


def _hub_clone(folder: Path) -> tuple[Row, list[Expected]]:
    """A folder as it lies on the Hub, with two configurations of parquet files."""
    for name, word in (("easy", "easy"), ("hard", "hard")):
        rows = {
            "image": [picture(i) for i in range(COUNT)],
            "question": [f"What {word} {i}?" for i in range(COUNT)],
            "answers": [["no", word]] * COUNT,
        }
        (folder / name).mkdir()
        datasets.Dataset.from_dict(rows).to_parquet(str(folder / name / "test-00000-of-00001.parquet"))
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: easy\n  data_files:\n  - split: test\n    path: easy/test-*\n"
        "- config_name: hard\n  data_files:\n  - split: test\n    path: hard/test-*\n---\n"
    )
    expected = [Expected(f"What hard {i}?", ("no", "hard")) for i in range(COUNT)]
    return {"source": str(folder), "subset": "hard", "split": "test"}, expected


def _streamed(folder: Path) -> tuple[Row, list[Expected]]:
    options, expected = _hub_clone(folder)
    return {**options, "streaming": True}, expected


FORMS: dict[str, Callable[[Path], tuple[Row, list[Expected]]]] = {
    "jsonl": _plain,
    "answers": _answers,
    "vqa votes": _vqa,
    "csv": _csv,
    "lettered tsv in base64": _lettered_tsv,
    "choices": _choices,
    "parquet": _parquet,
    "parquet of bytes": _parquet_bytes,
    "parquet of paths": _parquet_paths,
    "llava": _llava,
    "llava with several images": _llava_several,
    "cauldron": _cauldron,
    "messages": _messages,
    "messages in parquet": _messages_parquet,
    "image folder": _image_folder,
    "mmmu": _mmmu,
    "hub clone": _hub_clone,
    "stream": _streamed,
}
"""Each writes its files to a folder and gives the options of SourceConfig, and what its rows should be read as. Where
there are no splits, all rows are meant."""

"""Training from a stream: the rows that a whole source would give, shared out among processes, and gone on with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from support import tiny_vlm
from support.tiny_llava import llava
from support.tiny_training import TinyProcessor, questions

from kvcapsule.data import streams
from kvcapsule.data.source import load, stream
from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import DataError
from kvcapsule.training.families.transform import TransformFit
from kvcapsule.training.main import main
from kvcapsule.training.step_rows import StreamShares

ROWS, HELD_OUT = 30, 4
pytestmark = pytest.mark.usefixtures("one_thread", "quick_streams")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return questions(tmp_path_factory.mktemp("data"), ROWS)


def as_folder(source: str, folder: Path) -> str:
    """The same questions as a folder of two parquet files with their images within."""
    rows = [json.loads(line) for line in Path(source).read_text().splitlines()]
    for row in rows:
        row["image"] = {"bytes": Path(row["image"]).read_bytes(), "path": None}
    folder.mkdir()
    for number, part in enumerate((rows[:20], rows[20:])):
        table = datasets.Dataset.from_list(part).cast_column("image", datasets.Image(decode=False))
        table.to_parquet(str(folder / f"train-0000{number}-of-00002.parquet"))
    return str(folder)


def config(source: str, **options: Any) -> SourceConfig:
    return SourceConfig(source, **{"split": "all", "streaming": True, "size": 100, **options})


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stream_gives_every_row_once_an_epoch(source: str, tmp_path: Path, kind: str) -> None:
    where = source if kind == "file" else as_folder(source, tmp_path / "folder")
    whole = load(SourceConfig(where, "all"))
    questions = stream(config(where), HELD_OUT)
    epochs = [list(questions.epoch(number)) for number in (0, 0, 1)]
    prompts = [[row["prompt"] for row in rows] for rows in epochs]
    assert prompts[0] == prompts[1] != prompts[2]
    assert sorted(prompts[0]) == sorted(prompts[2])
    assert sorted([*prompts[0], *(row["prompt"] for row in questions.first)]) == sorted(whole["prompt"])
    assert epochs[0][0].keys() == {*whole.column_names, "index"}
    assert "a stream of 100 rows at most" in questions.description
    # The rows that other commands take of the same stream.
    taken = load(config(where, size=12))["prompt"][:]
    assert sorted(taken) == sorted(row["prompt"] for row in [*questions.first, *epochs[0]][:12])


def test_size_is_the_most(source: str) -> None:
    questions = stream(config(source, size=12), HELD_OUT)
    assert (len(questions), len(list(questions.epoch(0))), len(list(questions.epoch(3)))) == (8, 8, 8)


def test_a_stream_is_not_held(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of it is read than a step takes, and a shuffle's buffer."""
    monkeypatch.setattr(streams, "BUFFER", 6)
    read = 0
    lines = streams._lines

    def counted(path: Path) -> Iterator[Any]:
        nonlocal read
        for line in lines(path):
            read += 1
            yield line

    monkeypatch.setattr(streams, "_lines", counted)
    rows = stream(config(source), HELD_OUT).epoch(0)
    before = read
    for _ in range(3):
        next(rows)
    # The rows before the held-out ones' end, three more, the buffer, and the one that follows it.
    assert read - before <= HELD_OUT + 3 + 6 + 1 < ROWS


@pytest.mark.parametrize("world", [1, 2, 4])
def test_steps_depend_on_their_number_alone(source: str, world: int) -> None:
    questions = stream(config(source), HELD_OUT)
    whole = [sorted(row["prompt"] for row in step) for step in _steps(StreamShares(questions, 4, 0, 1), 0, 14)]
    for first in (0, 3, 6, 9):
        ranks = [_steps(StreamShares(questions, 4, rank, world), first, 14) for rank in range(world)]
        together = [sorted(row["prompt"] for share in step for row in share) for step in zip(*ranks, strict=True)]
        assert together == whole[first:]
    # An epoch of 26 rows has 6 whole steps of 4; the next one is shuffled anew.
    assert len({str(step) for step in whole[:6]}) == 6 and whole[6:12] != whole[:6]
    fixed = _steps(StreamShares(questions, 4, 0, 1, fixed=True), 0, 12)
    assert fixed[6:] == fixed[:6]


def _steps(shares: StreamShares, first: int, steps: int) -> list[list[dict[str, Any]]]:
    shares.run(first, steps)
    assert len(shares) == steps
    return list(shares)


WORDS = ["transform", "--model", "tiny", "--data.split", "all", "--data.streaming", "true", "--batch", "4"]
WORDS += [
    "--held_out",
    str(HELD_OUT),
    "--codec.tile",
    "4",
    "--moment-batches",
    "4",
    "--device",
    "cpu",
    "--threads",
    "1",
]
WORDS += ["--compression", "2", "--transform.query_bank", "8", "--transform.steps", "8", "--transform.logit-batches"]
WORDS += ["0", "--transform.lr", "1e-3"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_vlm.build("llava", llava()), TinyProcessor(llava())
    monkeypatch.setattr("kvcapsule.training.fit.load_vlm", lambda *_: loaded)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("stopped", "workers"), [(3, "0"), (7, "2")])
def test_an_interrupted_run_goes_on_with_the_same_rows(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: int, workers: str
) -> None:
    """In the midst of the first epoch of 6 steps, and of the second."""
    assert main([*WORDS, "--data.source", source, "--output", str(tmp_path / "whole")]) == 0
    words = [*WORDS, "--data.source", source, "--output", str(tmp_path / "c"), "--workers", workers]
    seen: list[tuple[int, ...]] = []
    step = TransformFit.training_step

    def interrupted(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch.digests)
        if self.global_step == stopped:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr("kvcapsule.training.checkpoints._EVERY_STEPS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(TransformFit, "training_step", interrupted)
        assert main(words) == 130
    again: list[tuple[int, ...]] = []
    with monkeypatch.context() as patch:
        patch.setattr(TransformFit, "training_step", lambda s, b, i: again.append(b.digests) or step(s, b, i))
        assert main([*words, "--resume"]) == 0
    assert again[0] == seen[-1] and len(seen) + len(again) == 8 + 1
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "c"))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)
    rows = [load_file(tmp_path / name / "training_rows.safetensors") for name in ("whole", "c")]
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.split", "train"], "has no splits, and a share of its images is known only when all are read"),
        (["--data.split", "all[:50%]"], "--data.streaming has no shares"),
        (["--data.source", "pages", "--data.split", "train"], "--data.streaming is for other data"),
        (["--data.size", "4"], "cannot spare 4 to measure on"),
        (["--data.size", "6"], "ends 2 rows behind the 4 held out, and a step takes 4"),
        (["--data.subset", "easy"], "is a file, which has no subsets"),
        (["--data.source", "no/such/thing"], "there is no file or folder"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(
    source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main([*WORDS, "--data.source", source, "--output", str(tmp_path / "c"), *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_broken_row_is_named_or_skipped(source: str, tmp_path: Path) -> None:
    lines = Path(source).read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines[:9], '{"image": "nowhere.png", "prompt": "what", "answer": "no"}', *lines[9:]]))
    with pytest.raises(DataError, match=r"line 10 of broken.jsonl: there is no image nowhere.png"):
        list(stream(config(str(broken)), HELD_OUT).epoch(0))
    questions = stream(config(str(broken), skip_broken=True), HELD_OUT)
    assert len(list(questions.epoch(0))) == ROWS - HELD_OUT


def test_an_empty_stream_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        stream(config(str(tmp_path / "a.jsonl")), 1)

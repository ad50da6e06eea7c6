"""`kvcapsule report`: the page about a capsule, read as a browser reads it."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.builders import identity_capsule, kv_capsule
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule import KVGeometry
from kvcapsule.capsule.overview import overview
from kvcapsule.capsule.training_rows import ROWS_FILE, TrainingRows
from kvcapsule.cli import main
from kvcapsule.cli.errors import WRONG_INPUT
from kvcapsule.data.batches import encode_questions, read_question
from kvcapsule.data.row_digest import row_digest
from kvcapsule.data.source import load
from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import InputError
from kvcapsule.eval.capsule_page.content import read_evaluation
from kvcapsule.eval.capsule_page.examples import chosen_rows
from kvcapsule.eval.capsule_page.token_loss import token_loss
from kvcapsule.eval.capsule_page.training_curves import training_curves

QUICK = ["--max-new-tokens", "4"]


class Parts(HTMLParser):
    """Text, and all that the page asks for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of a shipped capsule, beside a log of its training, as if the first example were a training row."""
    folder = tmp_path_factory.mktemp("page")
    shutil.copytree(Path(__file__).parents[2] / "checkpoints" / "pages-vlm-kvcapsule", folder / "mine")
    log = folder / "mine.run" / "csv" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("epoch,loss,step,validation/kl\n0,2.0,0,\n0,1.0,5,\n0,nan,7,\n0,,9,0.5\n")
    first = read_question(chosen_rows(load(SourceConfig(split="test", size=200)), 2)[0], 0)
    (folder / "mine" / ROWS_FILE).write_bytes(TrainingRows.of([row_digest(first)]).to_bytes())
    assert main(["report", str(folder / "mine"), "--examples", "2", *QUICK]) == 0
    return folder / "mine" / "report.html"


def test_it_is_one_file_without_scripts_or_paths(page: Path) -> None:
    parts = Parts(page.read_text())
    assert parts.sources and all(source.startswith("data:image/") for source in parts.sources)
    assert "script" not in parts.tags and "link" not in parts.tags
    assert str(page.parent.parent) not in parts.text


def test_what_it_says(page: Path) -> None:
    text = Parts(page.read_text()).text
    for words in (
        "1.2x fewer bytes",
        "94.8% of 800 answers",
        "post-vision-attention",
        "Transcribe the page.",
        "lookup",
        "none left out. The capsule was trained on 50% of them.",
    ):
        assert words in text
    assert text.count("expected: ") == 2 and "No curves" not in text


def test_a_browser_shows_it(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    words = [
        browser,
        "--headless",
        "--no-sandbox",
        *quiet,
        f"--user-data-dir={tmp_path}/profile",
        "--window-size=1000,3000",
    ]
    subprocess.run(
        [*words, f"--screenshot={tmp_path}/page.png", page.as_uri()], check=True, capture_output=True, timeout=100
    )
    with Image.open(tmp_path / "page.png") as shown:
        # Text, plots and maps: neither blank nor an error's few colours.
        assert shown.size == (1000, 3000) and len(set(shown.convert("RGB").resize((250, 750)).getdata())) > 500


def test_the_loss_of_tokens(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """A capsule that stores all loses nothing, and neither do raw tokens; a coarse one loses of every other."""
    capsule = kv_capsule(KVGeometry.from_config(model.config))
    rows = load(SourceConfig(size=1))
    inputs, spans = encode_questions([read_question(rows[0], 0)], model, processor)
    loss = token_loss(model, capsule, inputs)
    assert loss is not None
    tile, length = capsule.config.codec.tile, spans[0].length
    covered = length // tile * tile
    assert loss.keys.shape == loss.values.shape == (len(loss.layers), length)
    assert loss.grid[0] * loss.grid[1] == length
    assert (loss.keys[:, :covered] > 0).all() and (loss.values[:, :covered] > 0).all()
    assert not loss.keys[:, covered:].any() and not loss.values[:, covered:].any()
    assert torch.isfinite(loss.keys).all()
    lossless = token_loss(model, identity_capsule(capsule.config.geometry, tile), inputs)
    assert lossless is not None and lossless.keys.max() < 1e-9 and lossless.values.max() < 1e-9


def test_examples_are_of_all_kinds() -> None:
    rows = chosen_rows(load(SourceConfig(size=12)), 4)
    assert len(set(rows["task"])) == 4
    assert len(chosen_rows(rows, 10)) == 4


def test_curves_of_a_run(page: Path, tmp_path: Path) -> None:
    (curve,) = training_curves(page.parent)
    assert curve == ("loss", [0, 5], [2.0, 1.0])
    assert training_curves(tmp_path) == []


@pytest.mark.parametrize("log", ["step,loss\n0,x\n", "step,loss\n0,1,2\n", "loss\n1\n", "step,loss\n0.5,1\n", "\xff"])
def test_a_damaged_log(log: str, tmp_path: Path) -> None:
    file = tmp_path / "c.run" / "csv" / "metrics.csv"
    file.parent.mkdir(parents=True)
    file.write_bytes(log.encode("latin-1"))
    with pytest.raises(InputError, match=r"the log .*metrics\.csv cannot be read \(.*: delete it"):
        training_curves(tmp_path / "c")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "name the capsule first"),
        (["--examples", "2"], "name the capsule first"),
        (["no-such-capsule"], "no-such-capsule"),
        (["pages-vlm-kvcapsule", "--examples", "0"], "1 to 64 examples"),
        (["pages-vlm-kvcapsule", "--evaluation", "absent.json"], "cannot be read"),
        (["pages-vlm-kvcapsule", "--protocol", "later"], "--protocol later is unknown"),
        (["pages-vlm-kvcapsule", "--no-such-option"], "no-such-option"),
    ],
)
def test_wrong_input(
    words: list[str], said: str, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["report", *words]) == WRONG_INPUT
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("kvcapsule report: ") and said in line
    assert not list(tmp_path.iterdir())


RESULTS = Path(__file__).parents[2] / "eval" / "results"


@pytest.mark.parametrize(
    ("evaluation", "said"),
    [
        ({"rows": 3}, "no rows of methods"),
        ({"rows": []}, "no rows of methods"),
        ({"rows": [{"method": "full"}]}, "row 1 has no family"),
        ("bench-cpu.json", "row 1 has no family"),
        ("smol-vlm.json", "not of pages-vlm-kvcapsule (it measured cross-layer-10"),
        ("smol-vlm-full.json", "not of pages-vlm-kvcapsule (it measured no capsule)"),
    ],
)
def test_an_evaluation_of_another_kind(
    evaluation: dict[str, object] | str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another command, or of other capsules: figures of another one of the same family are not shown as its own."""
    if isinstance(evaluation, str):
        file = RESULTS / evaluation
    else:
        file = tmp_path / "other.json"
        file.write_text(json.dumps(evaluation))
    words = ["report", "pages-vlm-kvcapsule", "--evaluation", str(file), "--output", str(tmp_path / "p.html")]
    assert main(words) == WRONG_INPUT
    assert said in capsys.readouterr().err and not (tmp_path / "p.html").exists()


def test_an_evaluation_of_this_capsule(page: Path) -> None:
    capsule = overview(page.parent)
    (row,) = [row for row in capsule.rows if row["family"] == "kvcapsule"]
    file = page.with_name("eval.json")
    file.write_text(json.dumps({"rows": [{**row, "settings": {"capsule": "runs/mine"}}]}))
    assert read_evaluation(str(file), capsule)["rows"][0]["agreement"] == row["agreement"]

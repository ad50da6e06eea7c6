"""What is known before the model runs: tiles, what fills none, and what is refused for it."""

from pathlib import Path

import pytest

from kvcapsule.errors import DataError
from kvcapsule.training.image_tokens import ImageTokens, raw_tokens_line, tile_of
from kvcapsule.training.main import main

PAGES = ImageTokens((196,) * 16, 16)
MIXED = ImageTokens((196, 64, 100, 40), 4)


def test_the_compression_that_comes_out_is_said_beforehand() -> None:
    assert raw_tokens_line(PAGES, 64, 20, 32) == (
        "images of 196 visual tokens fill 3 tiles of 64, and 4 tokens fill no tile and stay raw: 11.1x is stored in"
        " all, of the 20.0x of tiles. A --codec.tile of 49 leaves none."
    )
    assert "14.4x is stored in all" in str(raw_tokens_line(PAGES, 64, 20, 16))
    assert raw_tokens_line(PAGES, 49, 20, 32) is None
    assert raw_tokens_line(PAGES, 195, 2.5, 16) is None, "a token hardly matters"
    line = str(raw_tokens_line(MIXED, 64, 20, 16))
    assert line.startswith("20% of the visual tokens fill no tile") and "A smaller --codec.tile" in line
    # 191 is prime: only far smaller tiles divide it.
    assert str(raw_tokens_line(ImageTokens((191,), 1), 64, 20, 16)).endswith("of tiles.")


def test_tiles_are_counted_where_images_are_alike() -> None:
    assert PAGES.most_tiles(49, 32) == 4 * 32 and PAGES.most_tiles(64, 17) == 3 * 32
    assert MIXED.most_tiles(49, 32) is None


@pytest.mark.parametrize(
    ("images", "wanted", "align", "says"),
    [
        (PAGES, 300, 1, "--codec.tile 300: nothing fills a tile of 300 visual tokens, the largest image"),
        (ImageTokens((), 4), 49, 1, "the prompts hold no image"),
        (MIXED, 0, 1, "images of 40, 64, 100, 196 visual tokens: give a tile"),
        (PAGES, 0, 128, "choose a --codec.align of at most 98"),
    ],
)
def test_images_that_no_tile_fits(images: ImageTokens, wanted: int, align: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        tile_of(images, wanted, align)


def test_tiles_that_fit() -> None:
    assert (tile_of(MIXED, 196, 1), tile_of(PAGES, 0, 1), tile_of(PAGES, 0, 32)) == (196, 196, 160)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--codec.tile", "300"], "fills a tile of 300 visual tokens, the largest image of the first ones has 196"),
        (["--moment-batches", "1"], "tiles are too few for stable bases of 196 tokens: at least 56 are needed"),
        (["--data.size", "20", "--held-out", "10"], "a lower --held-out"),
        (["--compression", "4000", "--codec.tile", "14"], "address and frame: store more"),
        (["--family", "kvcapsule", "--compression", "50", "--codec.tile", "49"], "one row at least: 49x is the most"),
        (["--family", "compact", "--compression", "50", "--codec.tile", "49"], "one row at least: 49x is the most"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_runs(
    words: list[str],
    says: str,
    vlm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for forward in ("harvest", "streamed"):
        monkeypatch.setattr(f"kvcapsule.training.harvest_source.{forward}", lambda *_: pytest.fail("ran the model"))
    quick = ["--data.size", "24", "--held-out", "8", "--batch", "4", "--device", "cpu"]
    family = [] if "--family" in words else ["transform"]
    assert main([*family, "--model", vlm, "--output", str(tmp_path / "c"), *quick, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line and not list(tmp_path.iterdir())

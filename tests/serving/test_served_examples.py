"""The examples that need vLLM, or torchvision as processors of videos do: this environment has both."""

import re
import runpy
from pathlib import Path

import pytest
from support.serving_engine import Engines
from support.tiny_video_vlm import save_video_vlm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_serving(engines: Engines, capsys: pytest.CaptureFixture[str]) -> None:
    """`engines` clears away what the example's own engine leaves in the process."""
    runpy.run_path(str(EXAMPLES / "serving.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-4:] == ["gnu 323", "pig 6102", "asp 76", "ewe 2599"]


def test_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny model, whose words mean nothing."""
    monkeypatch.setattr("sys.argv", ["video.py", save_video_vlm(tmp_path / "model")])
    runpy.run_path(str(EXAMPLES / "video.py"), run_name="__main__")
    *_, line = capsys.readouterr().out.splitlines()
    video, cache, full = (int(count.replace(",", "")) for count in re.findall(r"\d[\d,]*", line))
    # Two frames in one, 4 tokens each, of 4 bits where the full cache has 32.
    assert 0 < video < full / 8 and video < cache < full

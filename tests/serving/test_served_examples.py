"""The examples that need vLLM, or torchvision as processors of videos do: this environment has both."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_video_vlm import save_video_vlm

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_serving(tmp_path: Path) -> None:
    """In a process of its own, which an engine keeps to itself."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "serving.py"], capture_output=True, text=True, cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-4:] == ["fox 8846", "", "", ""]


def test_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tiny model, whose words mean nothing."""
    monkeypatch.setattr("sys.argv", ["video.py", save_video_vlm(tmp_path / "model")])
    runpy.run_path(str(EXAMPLES / "video.py"), run_name="__main__")
    *_, line = capsys.readouterr().out.splitlines()
    assert line == ""

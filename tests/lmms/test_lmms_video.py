"""Questions about videos, for a family whose processor reads them."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from support.tiny_video_vlm import SIDE, save_video_vlm

from kvcapsule.errors import DataError
from kvcapsule.eval.lmms.answers import Answerer
from kvcapsule.eval.lmms.arguments import ModelArguments
from kvcapsule.vlm.geometry import KVGeometry

SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_video_vlm(tmp_path_factory.mktemp("video-vlm"))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two seconds, 16 frames."""
    path = str(tmp_path_factory.mktemp("video") / "noise.mp4")
    frames = np.random.default_rng(0).integers(0, 255, (16, SIDE, SIDE, 3), dtype=np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(8))
        stream.width = stream.height = SIDE
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def asked(video: str, prompt: str) -> list[dict[str, object]]:
    content = [{"type": "video", "url": video}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(("frames", "steps"), [({"num_frames": 4}, 2), ({"fps": 4}, 4)])
def test_a_video_has_as_many_frames_as_asked(vlm: str, video: str, frames: dict[str, int], steps: int) -> None:
    answerer = Answerer(ModelArguments(pretrained=vlm, device="cpu", policy="int8", **frames))  # type: ignore[arg-type]
    with answerer.attached():
        answers, measure = answerer.answer([asked(video, "w5"), asked(video, "w6 w7 w8")], SETTINGS)
    assert len(answers) == 2 and measure.visual_tokens == [16 * steps] * 2 and measure.new_tokens == [4, 4]
    geometry = KVGeometry.from_config(answerer.model.config)
    token = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * 4
    assert measure.full_visual == 2 * 16 * steps * token and measure.stored.visual < 0.5 * measure.full_visual


def test_a_file_that_is_no_video_is_named(vlm: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    answerer = Answerer(ModelArguments(pretrained=vlm, device="cpu", num_frames=4))
    with pytest.raises(DataError, match=r"text\.mp4 cannot be read"):
        answerer.answer([asked(str(tmp_path / "text.mp4"), "w5")], SETTINGS)


def test_what_keeps_everything_answers_as_the_full_cache(vlm: str, video: str) -> None:
    texts = []
    for arguments in ({}, {"policy": "evenly-spaced", "budget": 1.0}):
        answerer = Answerer(ModelArguments(pretrained=vlm, device="cpu", num_frames=4, **arguments))  # type: ignore[arg-type]
        with answerer.attached():
            texts.append(answerer.answer([asked(video, "w5"), asked(video, "w6 w7 w8")], SETTINGS)[0])
    assert texts[0] == texts[1]

"""Videos of a chat as frames.

transformers' processors decode by torchcodec, which needs FFmpeg; lmms-eval brings PyAV, which needs nothing else.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin
from transformers.video_utils import load_video

from kvcapsule.errors import DataError


def load_videos(
    conversations: Sequence[list[dict[str, Any]]],
    processor: ProcessorMixin,
    num_frames: int | None = None,
    fps: float | None = None,
) -> dict[str, Any]:
    """Put frames in the place of paths, as the processor samples them.

    Args:
        conversations: as from kvcapsule.eval.lmms.chats; changed in place. A list of frames is left as it is.
        processor: of the model; it takes videos where there are any.
        num_frames: of each video.
        fps: frames for each second, in place of num_frames. With neither, the processor's own choice.

    Returns:
        Options of the processor for these conversations; none without videos.

    Raises:
        DataError: if a video cannot be read.
    """
    parts = [part for chat in conversations for turn in chat for part in turn["content"] if part["type"] == "video"]
    if not parts or not all(isinstance(part["video"], str | Path) for part in parts):
        return {}
    reader: Any = getattr(processor, "video_processor", None)
    sampled = num_frames is not None or fps is not None or bool(reader.do_sample_frames)
    choose = partial(reader.sample_frames, num_frames=num_frames, fps=fps) if sampled else None
    # transformers' annotation leaves paths out.
    load: Any = load_video
    metadata = []
    for part in parts:
        try:
            part["video"], of_video = load(str(part["video"]), backend="pyav", sample_indices_fn=choose)
        # PyAV's errors are OSErrors or ValueErrors, by their kind.
        except (OSError, ValueError, ImportError) as error:
            raise DataError(f"the video {part['video']} cannot be read: {error}") from error
        metadata.append(of_video)
    return {"video_metadata": metadata, "do_sample_frames": False}

"""lmms-eval's messages as conversations in transformers' chat form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from kvcapsule.data.images import open_image, upright_rgb
from kvcapsule.errors import DataError, InputError


def conversation(messages: Any, processor: ProcessorMixin) -> list[dict[str, Any]]:
    """One chat, its texts, images and videos in their order.

    Args:
        messages: turns with a role and a list of content, as a task's doc_to_messages gives them.
        processor: of the model.

    Raises:
        DataError: if an image or a video cannot be read.
        InputError: for what is no chat, for audio, for a part of a video, and for a video where the processor takes
            none.
    """
    if not isinstance(messages, Sequence) or not messages or not all(isinstance(turn, Mapping) for turn in messages):
        raise InputError(
            f"the task's messages are of type {type(messages).__name__}; a list of turns is needed, so the task must"
            " have doc_to_messages, or doc_to_visual and doc_to_text."
        )
    return [
        {"role": turn["role"], "content": [_content(part, processor) for part in _parts(turn["content"])]}
        for turn in messages
    ]


def _parts(content: Any) -> Sequence[Mapping[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _content(part: Mapping[str, Any], processor: ProcessorMixin) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": _image(part["url"])}
    if kind == "video":
        return {"type": "video", "video": _video(part, processor)}
    raise InputError(f"the task has content of the type {kind!r}; kvcapsule takes text, images and video.")


def _image(image: Any) -> Image.Image:
    if isinstance(image, str | Path):
        return open_image(image)
    if not isinstance(image, Image.Image):
        raise DataError(f"the task has an image of type {type(image).__name__}; a picture or its path is needed.")
    return upright_rgb(image)


def _video(part: Mapping[str, Any], processor: ProcessorMixin) -> Any:
    video = part["url"]
    if getattr(processor, "video_processor", None) is None:
        raise InputError(
            f"the task has videos, and {type(processor).__name__} takes images alone: use a model of a family that"
            " reads video (`kvcapsule models` lists them)."
        )
    bounds = video if isinstance(video, Mapping) else part
    if any(bounds.get(name) is not None for name in ("start_time", "end_time", "video_start", "video_end")):
        raise InputError("the task asks about a part of a video, between two times; kvcapsule reads whole videos.")
    if isinstance(video, str | Path) and "://" not in str(video) and not Path(video).is_file():
        raise DataError(f"there is no video {video}.")
    return video

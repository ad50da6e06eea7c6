"""Loading a VLM and its processor by name."""

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from kvcapsule.checkpoints import shipped

from ..errors import ModelError
from ..testbeds import efficientnet_lite as _  # noqa: F401  Registers smol-vlm's vision tower with the Auto classes.
from .precisions import PRECISIONS

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in PRECISIONS}
_BUILT_LOCALLY = "smol-vlm"
"""Model that `make smol-vlm` builds locally instead of being shipped."""


def require_device(device: str | None) -> None:
    """Check, before anything is loaded, that torch can use a device.

    Raises:
        ModelError: with torch's reason, if it cannot.
    """
    if device in (None, "auto"):
        return
    try:
        torch.empty(0, device=device)
    # A torch build without CUDA raises an AssertionError.
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def load_vlm(
    name: str, revision: str | None = None, dtype: str = "auto", device: str | None = None, resize: bool = True
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a frozen VLM in eval mode, and its processor.

    Args:
        name: a folder, the name of a shipped model ("pages-vlm") or an id on the Hub.
        revision: branch, tag or commit on the Hub.
        dtype: "auto" (as saved), "float32", "float16" or "bfloat16".
        device: e.g. "cpu" or "cuda"; None means CUDA if available. "auto" splits the model by accelerate's device_map.
        resize: whether the image processor resizes images to its own size. If False they keep their size, which the
            model must support.

    Raises:
        ModelError: if the model is not found, is not an image-text-to-text model of transformers, or `resize` is False
            and its image processor cannot leave images as they are.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}: choose auto, {', '.join(DTYPES)}.")
    source = str(shipped(name) or name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            source,
            revision=revision,
            dtype=dtype if dtype == "auto" else DTYPES[dtype],
            device_map=device,
            trust_remote_code=False,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # Whatever transformers meets in files that are damaged or of another kind.
        if Path(name).name == _BUILT_LOCALLY and not Path(source).exists():
            raise ModelError(f"there is no folder {name!r}: `make {_BUILT_LOCALLY}` makes it.") from error
        if Path(source).exists():
            raise ModelError(f"cannot load the folder {name!r} as a vision-language model: {error}") from error
        raise ModelError(
            f"cannot load the model {name!r} as a vision-language model: there is no folder {Path(name).absolute()},"
            f" and from the Hub: {error}"
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{name!r} has no image processor beside its tokenizer: it is a language model, not a vision-language"
            " model."
        )
    if not resize:
        if not isinstance(getattr(processor.image_processor, "do_resize", None), bool):
            raise ModelError(
                f"{type(processor.image_processor).__name__} cannot leave images at their sizes: do not ask for it."
            )
        processor.image_processor.do_resize = False
    return model.eval().requires_grad_(False), processor

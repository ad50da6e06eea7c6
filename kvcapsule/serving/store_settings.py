"""The image store of an engine: opened as its settings say, and what of the engine all entries depend on."""

import hashlib
from typing import Any

import torch
import transformers
import vllm
from vllm.logger import init_logger

from .._version import __version__
from ..errors import ConfigError
from ..store.image_store import ImageStore
from .model_files import ModelFiles, has_weights, model_folder
from .settings import SCHEDULER, Settings

logger = init_logger(f"vllm.{__name__}")
_FROM_FOLDER = ("auto", "hf", "safetensors", "fastsafetensors", "mistral")
"""Load formats that read the files of the model's folder, and nothing else."""


def open_store(settings: Settings, vllm_config: Any) -> tuple[ImageStore, ModelFiles] | None:
    """The store, and the digest of the model's files, if a store was asked for and can serve the model.

    Raises:
        ConfigError: for a folder that cannot be used, or an engine that gets images from elsewhere.
    """
    if settings.store is None:
        return None
    if vllm_config.ec_transfer_config is not None:
        raise ConfigError(
            "an image store does not work with encoder outputs of other engines (--ec-transfer-config): leave one out."
        )
    model, load = vllm_config.model_config, vllm_config.load_config
    folder = model_folder(model.model, model.revision, load.download_dir)
    if model.model_weights not in ("", model.model):
        why = f"its weights come from elsewhere, {model.model_weights}"
    elif load.load_format not in _FROM_FOLDER:
        why = f"its load format is {load.load_format}, and not one of {', '.join(_FROM_FOLDER)}"
    elif folder is None or not has_weights(folder):
        why = "its weights are no files of a folder"
    else:
        return ImageStore(settings.store, max_bytes=settings.store_max_bytes), ModelFiles(folder)
    logger.warning("The image store is not used for %s: %s.", model.model, why)
    return None


def store_facts(vllm_config: Any) -> dict[str, Any]:
    """What an image's KV depends on beside weights, capsule, tokens and pixels."""
    model = vllm_config.model_config
    return {
        "config": hashlib.sha256(model.hf_config.to_json_string(use_diff=False).encode()).hexdigest(),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "model_impl": str(model.model_impl),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "kvcapsule": __version__,
    }


def require_cuts(vllm_config: Any) -> None:
    """Raises ConfigError unless the engine's scheduler ends steps with images."""
    from .scheduler import CapsuleScheduler

    chosen = vllm_config.scheduler_config.get_scheduler_cls()
    if not issubclass(chosen, CapsuleScheduler):
        raise ConfigError(
            f"an image store needs kvcapsule's scheduler, and the engine's is {chosen.__name__}: pass --scheduler-cls"
            f" {SCHEDULER}."
        )

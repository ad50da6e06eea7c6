"""The model that a capsule was trained on: what is recorded of it, and whether a model is that one."""

from typing import Any

import torch

from ..vlm.fingerprint import fingerprint
from ..vlm.license import license_of
from ..vlm.weights import UnreadableError
from .config import CapsuleConfig
from .local_names import is_local
from .record import ModelRecord

_ADVICE = "its answers may be far worse than measured. Use that model, or train a capsule for this one."


def record_of(name: str, model: Any) -> ModelRecord:
    """What a capsule records of its base model.

    Args:
        name: by which it was loaded.
        model: of transformers, without a wrapper.
    """
    license = license_of(name, commit_of(model))
    try:
        now = fingerprint(model)
    except UnreadableError:
        return ModelRecord(is_local(name), license=license)
    return ModelRecord(is_local(name), now.dtype, dict(now.weights), now.adapter, license)


def commit_of(model: Any) -> str | None:
    """The commit on the Hub that a model was loaded from; None for a folder."""
    return getattr(model.config, "_commit_hash", None)


def difference(config: CapsuleConfig, model: torch.nn.Module) -> str | None:
    """One line on how the model differs from a capsule's base model; None if it does not, or if that is not known.

    Args:
        config: of the capsule.
        model: of transformers, without a wrapper.
    """
    record = ModelRecord.of(config.metadata)
    if record.fingerprint is None or unknown(config, model) is not None:
        return None
    now, base = fingerprint(model), base_name(config)
    if not now.has_weights_of(record.fingerprint):
        return f"the capsule was trained on {base}, and the weights of {_name_of(model)} are others: {_ADVICE}"
    if now.adapter != record.adapter:
        return f"the capsule was trained on {base} {_adapters(record.adapter, now.adapter)}: {_ADVICE}"
    return None


def _adapters(trained: str, now: str) -> str:
    if trained and now:
        return "with another adapter than the active one"
    return "with an adapter, and none is active" if trained else "without an adapter, and one is active"


def unknown(config: CapsuleConfig, model: torch.nn.Module) -> str | None:
    """Why it cannot be known whether the model is a capsule's base model; None if it can."""
    if ModelRecord.of(config.metadata).fingerprint is None:
        return (
            "the capsule does not record the weights of its base model: train it again, with this version of kvcapsule"
        )
    try:
        fingerprint(model)
    except UnreadableError as error:
        return f"the weights of {_name_of(model)} cannot be compared with those of {base_name(config)}: {error}"
    return None


def base_name(config: CapsuleConfig) -> str:
    """The base model, and its revision where it has one."""
    at = f" at revision {config.base_revision}" if config.base_revision else ""
    return f"{config.base_model!r}{at}"


def _name_of(model: Any) -> str:
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return repr(name) if name else "this model"

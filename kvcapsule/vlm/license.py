"""The licence of a model, as its card states it."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from kvcapsule.checkpoints import shipped

CARD = "README.md"
LICENSE_KEYS = ("license", "license_name", "license_link")
"""Keys of a model card's front matter."""


def license_of(name: str, revision: str | None = None) -> dict[str, str]:
    """The licence of a model whose card lies on this machine, by LICENSE_KEYS; empty where that is not known. Nothing
    is downloaded.

    Args:
        name: a folder, a shipped name or an id on the Hub.
        revision: of the model on the Hub: the commit that was loaded.
    """
    folder = shipped(name) or Path(name).expanduser()
    card: Any = folder / CARD
    if not folder.is_dir():
        try:
            card = try_to_load_from_cache(name, CARD, revision=revision)
        except ValueError:
            return {}
    try:
        values = metadata_load(card) if isinstance(card, (str, Path)) and Path(card).is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: values[key] for key in LICENSE_KEYS if isinstance(values, dict) and isinstance(values.get(key), str)}

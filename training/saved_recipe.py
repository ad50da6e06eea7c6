"""Recipes that runs save beside their capsules: written without this machine's paths, known by their keys, and read
with the names of today."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from kvcapsule.capsule.local_names import portable

from .recipe import Recipe

_SAVED = frozenset(("output", "force", "resume", "trainer"))
"""Keys by which a saved recipe is known: it holds every option."""


def _compression(ratio: Any) -> Any:
    """Before 0.1.0 a ratio up to 1 was the share that is stored."""
    return 1 / ratio if isinstance(ratio, (int, float)) and 0 < ratio <= 1 else ratio


_RENAMED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "ratio": ("compression", _compression),
    "codec.key_ratio": ("key_retention", lambda value: value),
    "codec.value_ratio": ("value_retention", lambda value: value),
    "optim.ratio_weight": ("retention_weight", lambda value: value),
    "transform.maps": ("max_map_mib", lambda value: value),
    "transform.readers": ("query_bank", lambda value: value),
}
"""Names of options before 0.1.0: the last part of the new name, and the new value of an old one."""


def is_saved(contents: Mapping[str, Any]) -> bool:
    """Whether a run saved this recipe, rather than a person wrote it."""
    return contents.keys() >= _SAVED


def upgraded(contents: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A saved recipe with the names of today; prefix: of the group that the contents are."""
    renamed = {}
    for key, value in contents.items():
        name, convert = _RENAMED.get(f"{prefix}{key}", (key, lambda value: value))
        renamed[name] = upgraded(value, f"{prefix}{key}.") if isinstance(value, Mapping) else convert(value)
    return renamed


def saved_options(recipe: Recipe) -> dict[str, Any]:
    """All options of a run; folders and files are named by their last part."""
    values = asdict(recipe)
    for name in ("model", "output", "harvests"):
        if values[name] is not None:
            values[name] = portable(values[name])
    values["data"]["source"] = portable(recipe.data.source)
    return values

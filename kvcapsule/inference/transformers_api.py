"""How the installed transformers names things, and which versions are supported; everything else asks here.

From 5.24 on a cache is passed to forward and generate as `cache` and returned under that name. Before it was
`past_key_values`, which 5.24 still takes with a deprecation warning.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import transformers
from packaging.specifiers import SpecifierSet
from transformers import GenerationMixin

from ..errors import ModelError
from ..vlm.families import TRANSFORMERS

_OLD_ARGUMENT = "past_key_values"
_TAKES_CACHE = "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE_ARGUMENT = "cache" if _TAKES_CACHE else _OLD_ARGUMENT
"""The name under which forward and generate take a cache and return one."""


def require_supported() -> None:
    """Refuse a transformers whose cache and attention interfaces were not tested.

    Raises:
        ModelError: with the versions that are supported, and how to get one.
    """
    version = transformers.__version__
    # A development version (5.25.0.dev0) counts by its number: it holds what that release will.
    if not SpecifierSet(TRANSFORMERS).contains(version, prereleases=True):
        raise ModelError(
            f"kvcapsule attaches to models of transformers {TRANSFORMERS}, and {version} is installed: run `pip install"
            f" 'transformers{TRANSFORMERS}'`."
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to forward or generate: `model(**inputs, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}


def passed_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward or a generate, under whichever name; None if there is none."""
    cache = arguments.get(CACHE_ARGUMENT)
    return arguments.get(_OLD_ARGUMENT) if cache is None else cache


def set_cache(arguments: dict[str, Any], cache: Any) -> None:
    """Make `cache` the one that these keyword arguments hand to forward or generate."""
    arguments.pop(_OLD_ARGUMENT, None)
    arguments[CACHE_ARGUMENT] = cache


def output_cache(output: Any) -> Any:
    """The cache in what a forward or a generate returned; None if it holds none."""
    return getattr(output, CACHE_ARGUMENT)


def replace_output_cache(output: Any, cache: Any) -> Any:
    """A copy of what a forward returned, with another cache in it."""
    return type(output)(**{**output, CACHE_ARGUMENT: cache})

"""Checks of a frozen config's values against the types of its fields, so that a wrong one is refused by its name."""

import math
from collections.abc import Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from .errors import ConfigError

LARGEST = 2**31 - 1
"""Most that a whole number of a config may be, either side of 0."""
_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", NoneType: "null"}


def check_fields(config: Any) -> None:
    """Raises ConfigError, naming the field, unless every value has the type that the dataclass gives its field.

    int, float, bool, str, sequences of them and unions with None are checked; fields of other types are not. A float
    field takes whole numbers, an int field no bool, and no number may be NaN or infinite.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        hint, value = hints[field.name], getattr(config, field.name)
        if not _fits(value, hint):
            raise ConfigError(f"{field.name} is {_shown(value)}; it must be {_expected(hint)}.")


def check_least(config: Any, least: dict[str, float]) -> None:
    """Raises ConfigError if a number field is below its least value; least: by name of the field."""
    for name, bound in least.items():
        if getattr(config, name) < bound:
            raise ConfigError(f"{name} {getattr(config, name)}: at least {bound} is needed.")


def _fits(value: Any, hint: Any) -> bool:
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if hint is float:
        return (isinstance(value, float) and math.isfinite(value)) or _fits(value, int)
    if hint is str or hint is NoneType:
        return isinstance(value, hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Sequence:
        (item,) = get_args(hint)
        return isinstance(value, list | tuple) and all(_fits(one, item) for one in value)
    return True


def _expected(hint: Any) -> str:
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_expected, get_args(hint)))
    if get_origin(hint) is Sequence:
        return f"a list, each item {_expected(get_args(hint)[0])}"
    return _NAMES.get(hint, str(hint))


def _shown(value: Any) -> str:
    """The value, or its beginning; a whole number of thousands of digits has no decimal form."""
    try:
        text = repr(value)
    except ValueError:
        text = "a very long number"
    return text if len(text) <= 80 else f"{text[:77]}..."

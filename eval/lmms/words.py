"""The words of `--model_args` as values by name."""

from collections.abc import Mapping
from typing import Any

from lmms_eval.utils import simple_parse_args_string

from kvcapsule.errors import ConfigError


def read_words(words: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Values by name, as lmms-eval parses them.

    Args:
        words: `name=value,name=value`.
        options: of lmms-eval itself that concern the model (batch_size, device, ...), None where there is none.

    Raises:
        ConfigError: for a word without a value, and for an option that stands in both with other values.
    """
    try:
        values: dict[str, Any] = simple_parse_args_string(words)
    except ValueError as error:
        raise ConfigError(f"model_args {words}: name=value,name=value is needed, and a word has no value.") from error
    for name, value in options.items():
        if value is None:
            continue
        value = int(value) if str(value).isdigit() else value
        # lmms-eval always hands on a batch size, 1 by default.
        if values.setdefault(name, value) != value and (name, value) != ("batch_size", 1):
            raise ConfigError(f"{name} is {values[name]} in model_args and {value} as an option: give it once.")
    return values

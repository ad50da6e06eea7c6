"""YAML files of options, read without aliases: nine nested ones stand for a file of a thousand million values."""

from pathlib import Path
from typing import Any

import yaml

from ..errors import InputError


def read_yaml(path: Path) -> Any:
    """The values of a file; None where it is empty.

    Raises:
        InputError: if it cannot be read, is no YAML or has aliases.
    """
    try:
        text = path.read_text(encoding="utf-8")
        require_no_alias(text, str(path))
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def require_no_alias(text: str, source: str) -> None:
    """Refuse a text with an alias; source: what to call it.

    Raises:
        InputError: for an alias. yaml.YAMLError: if the text is no YAML.
    """
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1
            raise InputError(f"{source}, line {line}: *{event.anchor} is an alias: write the values out.")

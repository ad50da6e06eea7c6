"""Commands whose options are the fields of a config class: the parser, and the config that a command line stands for.

Options are shown with dashes (`--max-new-tokens`). Underscores, as the fields and the YAML files have them, are
accepted as well. An option that is true or false needs no value to be true.
"""

import json
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ..errors import ConfigError, InputError
from ..yaml_files import read_yaml
from .errors import dashed
from .parse_errors import with_near_option

Config = TypeVar("Config")
_OF_YAML = yaml.constructor.__file__
"""Where PyYAML makes values: what fails there is about one of them, whatever it raises."""


class OptionParser(ArgumentParser):
    """A parser that knows the command's list options and the options that have a new name."""

    lists: Mapping[str, bool] = MappingProxyType({})
    """Options that may be repeated, such as {"methods": True}; True where commas separate values as well."""
    renamed: Mapping[str, str] = MappingProxyType({})
    """Options that no longer exist, such as "ratio", and the sentence that names the new one."""

    switches: Collection[str] = frozenset()
    """Options that are true or false, such as "dry_run", and true where no value is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What is unambiguous today would not be after the next option.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def print_help(self, file: Any = None) -> None:
        """As argparse's, but help that cannot be written is an error."""
        print(self.format_help(), end="", file=file)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return dashed(super().format_help(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As argparse's: raises ArgumentError, which names the option that an unknown one is like."""
        super().error(with_near_option(message, self._option_string_actions), ex)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As jsonargparse's; what it or PyYAML cannot make a value of is a ConfigError."""
        with _plain_values():
            parsed: Namespace = super().parse_args(*args, **kwargs)
            return parsed

    def parse_object(self, *args: Any, **kwargs: Any) -> Namespace:
        """The same of nested values."""
        with _plain_values():
            parsed: Namespace = super().parse_object(*args, **kwargs)
            return parsed

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Read a YAML file of options.

        Raises:
            ConfigError: if it has an option that was renamed.
            InputError: if it cannot be read.
        """
        try:
            values = read_yaml(Path(cfg_path))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{cfg_path} cannot be read: {' '.join(str(error).split())}.") from error
        require_current(values, self.renamed)
        parsed: Namespace = super().parse_path(cfg_path, *args, **kwargs)
        return parsed

    def read(self, words: Sequence[str]) -> Namespace:
        """Parse a command line, its options spelled with dashes or underscores.

        Raises:
            ConfigError: for an option that was renamed.
            ArgumentError: for an unknown option, or a value that it cannot have.
        """
        require_current_words(words, self.renamed)
        parsed: Namespace = self.parse_args(switched(normalized(words, self.lists), self.switches))
        return parsed


@contextmanager
def _plain_values() -> Iterator[None]:
    try:
        yield
    except OverflowError as error:
        raise ConfigError("an option has a number that is too large: at most 1.7e308 can be computed with.") from error
    except (AttributeError, ValueError) as error:
        if not any(frame.filename == _OF_YAML for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise ConfigError(
            f"an option has a value that cannot be read: {' '.join(str(error).split())[:200]}."
        ) from error


def option_parser(
    config: type[Any],
    prog: str,
    usage: str,
    description: str,
    *,
    lists: Mapping[str, bool] | None = None,
    renamed: Mapping[str, str] | None = None,
) -> OptionParser:
    """A parser with every field of a config class as an option, explained by its docstring, and --config.

    It raises ArgumentError and does not exit.

    Args:
        config: the class.
        prog: name of the command.
        usage: its first line of help.
        description: its second line of help.
        lists: see OptionParser.
        renamed: see OptionParser.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = OptionParser(prog=prog, usage=usage, description=description, exit_on_error=False)
    parser.lists, parser.renamed, parser.switches = lists or {}, renamed or {}, frozenset(switches(config))
    parser.add_argument("--config", action="config", help="YAML file of these options")
    parser.add_class_arguments(config, None)
    return parser


def instance(config: type[Config], parser: ArgumentParser, values: Any) -> Config:
    """The config that parsed values stand for.

    Raises:
        ConfigError: for null where an option needs a value.
    """
    values.pop("config", None)
    require_values(config, values)
    return config(**vars(parser.instantiate(values)))


def require_values(config: type[Any], values: Namespace, prefix: str = "") -> None:
    """Refuse null, which the parser takes for any option of a YAML file, for options that need a value.

    Args:
        config: a class of options.
        values: of its fields, as parsed.
        prefix: of the options of a group, such as "data.".

    Raises:
        ConfigError: naming the first such option.
    """
    for option in fields(config):
        name = f"{prefix}{option.name}"
        if isinstance(option.type, type) and is_dataclass(option.type):
            require_values(option.type, values, f"{name}.")
        elif option.type is not Any and type(None) not in get_args(option.type) and values.get(name, "") is None:
            raise ConfigError(f"--{name.replace('_', '-')} null: a value is expected.")


def normalized(words: Sequence[str], lists: Mapping[str, bool] | None = None) -> list[str]:
    """A command line as jsonargparse takes it: underscores in the names of options, all values of a list in one word.

    What the command line says of a list thus replaces what a suite or a YAML file says of it, and is not appended.

    Args:
        words: the command line.
        lists: see OptionParser.
    """
    result: list[str] = []
    values: dict[str, list[str]] = {}
    positions: dict[str, int] = {}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            result.append(word)
            continue
        field = name[2:].replace("-", "_")
        if lists and field in lists and (item := value if equals else next(rest, None)) is not None:
            if field not in values:
                values[field], positions[field] = [], len(result)
                result.append(field)
            values[field].extend(item.split(",") if lists[field] else [item])
        else:
            result.append(f"--{field}{equals}{value}")
    for field, position in positions.items():
        result[position] = f"--{field}={json.dumps(values[field])}"
    return result


def switches(config: type[Any], prefix: str = "") -> Iterator[str]:
    """The options of a config class that are true or false, as a command line spells them with underscores."""
    for option in fields(config):
        if option.type is bool:
            yield prefix + option.name
        elif isinstance(option.type, type) and is_dataclass(option.type):
            yield from switches(option.type, f"{prefix}{option.name}.")


def switched(words: Sequence[str], names: Collection[str]) -> list[str]:
    """A command line with =true behind each of these options that no value follows."""
    behind = [*words[1:], "--"]
    return [
        f"{word}=true" if word.startswith("--") and word[2:] in names and after.startswith("--") else word
        for word, after in zip(words, behind, strict=False)
    ]


def require_current_words(words: Sequence[str], renamed: Mapping[str, str]) -> None:
    """Refuse a command line with an option that was renamed.

    Raises:
        ConfigError: with the sentence that names the new option.
    """
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and (sentence := renamed.get(name[2:].replace("-", "_"))) is not None:
            raise ConfigError(sentence)


def require_current(values: Any, renamed: Mapping[str, str], prefix: str = "") -> None:
    """Refuse options that were renamed, in the nested values of a YAML file.

    Raises:
        ConfigError: with the sentence that names the new option.
    """
    for key, value in values.items() if isinstance(values, Mapping) else ():
        if f"{prefix}{key}" in renamed:
            raise ConfigError(renamed[f"{prefix}{key}"])
        require_current(value, renamed, f"{prefix}{key}.")

"""Commands whose options are the fields of a config class: their parser, and the config that a command line makes."""

from typing import Any, TypeVar

from jsonargparse import ArgumentParser, set_parsing_settings

Config = TypeVar("Config")


def option_parser(config: type[Any], prog: str, usage: str, description: str) -> ArgumentParser:
    """Every field of a config class as an option, explained by its docstring, and --config. It raises ArgumentError and
    does not exit."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=prog, usage=usage, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(config, None)
    return parser


def instance(config: type[Config], parser: ArgumentParser, values: Any) -> Config:
    """The config that parsed values stand for."""
    values.pop("config", None)
    return config(**vars(parser.instantiate(values)))

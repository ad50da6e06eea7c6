"""The help of `kvcapsule train`: the options of the family at hand, with the defaults of the recipe that would run."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from kvcapsule.cli.options import OptionParser

from .families import recipe_class, trainable
from .options import (
    RECIPE_HELP,
    build_parser,
    chosen_recipe,
    find_recipe,
    plain_parser,
    recipe_contents,
    shipped_recipes,
)
from .recipe import Recipe, flat, group_names, option_names

HELP = ("-h", "--help")


def help_text(words: Sequence[str]) -> str:
    """The help for a command line with --help in it: the options of the family that it names; where it names none, the
    shared options and those of each family. Defaults are those of the recipe that would run.

    Raises:
        ConfigError, InputError: for a recipe that is missing or cannot be read.
    """
    words = [word for word in words if word not in HELP]
    chosen = chosen_recipe(words)
    if not words:
        shared = plain_parser(build_parser().description or "")
        shared.add_argument("--recipe", action="config", help=RECIPE_HELP)
        shared.add_class_arguments(Recipe, None)
        _set_defaults(shared, Recipe, chosen.files[0][1])
        return "\n".join([shared.format_help(), *map(_family_help, trainable())])
    parser, options = build_parser(chosen.family), recipe_class(chosen.family)
    for _, contents in chosen.files:
        _set_defaults(parser, options, contents)
    return parser.format_help()


def _set_defaults(parser: OptionParser, options: type[Recipe], contents: Mapping[str, Any]) -> None:
    """Show the values of a recipe file as the defaults, of those options that the recipe class has."""
    groups, known = group_names(options), set(option_names(options))
    values = {name: value for name, value in flat(contents, groups) if name in known - groups}
    parser.set_defaults(values)


def _family_help(family: str) -> str:
    options, shared = recipe_class(family), set(option_names(Recipe))
    recipe = f" Defaults are those of the recipe {family}." if family in shipped_recipes() else ""
    parser = OptionParser(usage="", add_help=False, description=f"Options of the family {family}.{recipe}")
    added: set[str] = set()
    for option in fields(options):
        if isinstance(option.type, type) and is_dataclass(option.type):
            others = {f.name for f in fields(option.type) if f"{option.name}.{f.name}" in shared}
            if len(others) < len(fields(option.type)):
                parser.add_class_arguments(option.type, option.name, skip=others)
                added |= {f"{option.name}.{f.name}" for f in fields(option.type) if f.name not in others}
        elif option.name not in shared:
            parser.add_class_arguments(options, None, skip={f.name for f in fields(options)} - {option.name})
            added.add(option.name)
    if recipe:
        values = dict(flat(recipe_contents(find_recipe(family)), group_names(options)))
        parser.set_defaults({name: value for name, value in values.items() if name in added})
    return parser.format_help().partition("\n\n")[2]

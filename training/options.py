"""The command line of `kvcapsule train`: shared options, those of the chosen family, and the refusal of any others.

The family is chosen by --family, or else by the recipe. A recipe file that a run saved may have the names of earlier
versions and the options of all families, as those wrote them; options of other families are left out, and the user is
told which.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentError, set_parsing_settings

from kvcapsule.cli.options import (
    OptionParser,
    normalized,
    require_current,
    require_current_words,
    require_values,
    switched,
    switches,
)
from kvcapsule.cli.parse_errors import plain_line
from kvcapsule.codec import REGISTRY
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.methods.shown_names import known_name
from kvcapsule.shipped_yaml import find_yaml, shipped_names
from kvcapsule.yaml_files import LimitError, parse_yaml, read_yaml

from .families import recipe_class, trainable
from .recipe import Recipe, flat, group_names, option_names
from .saved_recipe import is_saved, upgraded

DEFAULT_RECIPE = "cross-layer"
"""Recipe of `kvcapsule train` without arguments."""
_RECIPES = "kvcapsule.training.recipes"
_USAGE = "kvcapsule train [RECIPE] [--compression C] [--model ID_OR_PATH] [--output DIR] [options]"
RECIPE_HELP = "YAML file of these options (the same as RECIPE)"
_RENAMED = {
    "ratio": "--ratio is --compression now, how many times fewer bytes are stored: give 20 where --ratio was 20 or"
    " 0.05.",
    "transform.maps": "--transform.maps is --transform.max-map-mib now, the upper limit in MiB for decoder maps.",
    "transform.readers": "--transform.readers is --transform.query-bank now, the training queries of each KV head.",
    "codec.key_ratio": "--codec.key-ratio is --codec.key-retention now.",
    "codec.value_ratio": "--codec.value-ratio is --codec.value-retention now.",
    "optim.ratio_weight": "--optim.ratio-weight is --optim.retention-weight now.",
}
"""Options that no longer exist, and the sentence that refuses them."""


def parse(words: Sequence[str], show: Callable[[str], None]) -> Recipe:
    """The recipe that a command line stands for.

    Args:
        words: RECIPE, if given, and options.
        show: prints a line to the user.

    Raises:
        ConfigError, InputError: for options or files that cannot be used.
    """
    chosen = chosen_recipe(words)
    options = recipe_class(chosen.family)
    parser = build_parser(chosen.family)
    configs = [_own_options(path, c, chosen.family, options, show) for path, c in chosen.files]
    rest = switched(chosen.rest, frozenset(switches(options)))
    for word in rest:
        if word.startswith("--"):
            _require_known(word[2:].partition("=")[0], chosen.family, options)
    _require_within_limits(rest, group_names(options))
    try:
        values = parser.parse_args([*(f"--recipe={c}" for c in configs), *_without("recipe", rest)])
    except ArgumentError as error:
        raise ConfigError(plain_line(str(error))) from error
    values.pop("recipe", None)
    require_values(options, values)
    built: Recipe = options(**{"family": chosen.family, **vars(parser.instantiate(values))})
    return built


class ChosenRecipe(NamedTuple):
    """The family and the recipe files that a command line names, before its options are read."""

    family: str
    files: list[tuple[Path, dict[str, Any]]]
    """Recipe files with their contents, each overriding those before it."""
    rest: list[str]
    """The words without RECIPE."""
    recipe: str | None
    """RECIPE; where there is none, the shipped recipe of the family, None where it has none."""


def chosen_recipe(words: Sequence[str]) -> ChosenRecipe:
    """Raises ConfigError, InputError: for a recipe that is missing or cannot be read."""
    require_current_words(words, _RENAMED)
    rest = normalized(words)
    named = known_name(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    wanted = _value_of("family", rest)
    wanted = wanted and known_name(wanted)
    if named is None:
        named = DEFAULT_RECIPE if wanted is None else wanted if wanted in shipped_recipes() else None
    paths = [*([] if named is None else [find_recipe(named)]), *map(Path, _values_of("recipe", rest))]
    files = [(path, recipe_contents(path)) for path in paths]
    family = wanted or next((str(c["family"]) for _, c in reversed(files) if "family" in c), DEFAULT_RECIPE)
    return ChosenRecipe(family, files, rest, named)


def build_parser(family: str = DEFAULT_RECIPE) -> OptionParser:
    """Every option of a family's recipe, explained by its docstring. It raises ArgumentError and does not exit."""
    parser = plain_parser(
        f"Train a capsule on the KV activations of a frozen VLM. RECIPE is a YAML file or the name of a shipped recipe"
        f" ({', '.join(shipped_recipes())}; default {DEFAULT_RECIPE}); options override its fields. Families:"
        f" {', '.join(dict.fromkeys([*trainable(), *REGISTRY.foreign()]))}. Defaults are those of the recipe."
    )
    parser.add_argument("--recipe", action="config", help=RECIPE_HELP)
    parser.add_class_arguments(recipe_class(family), None)
    return parser


def shipped_recipes() -> list[str]:
    """Names of the recipes in training/recipes/."""
    return shipped_names(_RECIPES)


def find_recipe(name: str) -> Path:
    """The YAML file of a recipe, given as a path or by its shipped name.

    Raises:
        InputError: if there is none.
    """
    return find_yaml(name, _RECIPES, "recipe")


def plain_parser(description: str) -> OptionParser:
    """The command's parser without options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return OptionParser(prog="kvcapsule train", usage=_USAGE, description=description, exit_on_error=False)


def recipe_contents(path: Path) -> dict[str, Any]:
    """The options in a recipe file, with their names of today.

    Raises:
        ConfigError: if it has an option that was renamed, unless a run saved it.
        InputError: if it cannot be read, or holds something else.
    """
    try:
        contents = read_yaml(path) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"the recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(contents, dict):
        raise InputError(f"the recipe {path} holds a {type(contents).__name__}, not options and their values.")
    if is_saved(contents):
        return upgraded(contents)
    try:
        require_current(contents, _RENAMED)
    except ConfigError as error:
        raise ConfigError(f"the recipe {path}: {error}") from error
    return contents


def _values_of(name: str, words: Sequence[str]) -> list[str]:
    """All values that a command line gives an option, in order."""
    values, rest = [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option == f"--{name}":
            values.append(value if equals else next(rest, ""))
    return values


def _value_of(name: str, words: Sequence[str]) -> str | None:
    values = _values_of(name, words)
    return values[-1] if values else None


def _without(name: str, words: Sequence[str]) -> list[str]:
    """A command line without an option and its values."""
    left, rest = [], iter(words)
    for word in rest:
        if word == f"--{name}":
            next(rest, None)
        elif not word.startswith(f"--{name}="):
            left.append(word)
    return left


def _owners(option: str) -> list[str]:
    """kvcapsule's families that have an option."""
    return [family for family in trainable() if option in set(option_names(recipe_class(family)))]


def _require_known(option: str, family: str, options: type[Recipe]) -> None:
    """Raises ConfigError for an option that only other families have; what no family has, the parser refuses."""
    if option not in set(option_names(options)) and (owners := _owners(option)):
        raise ConfigError(_not_of(option, owners, family))


def _require_within_limits(words: Sequence[str], groups: frozenset[str]) -> None:
    """Raises InputError if the value of a group of options, a YAML file or YAML itself, is past a limit."""
    for group in groups:
        for value in _values_of(group, words):
            try:
                # No path is as long as what limits are for.
                if len(value) < 256 and Path(value).is_file():
                    read_yaml(Path(value))
                else:
                    parse_yaml(value)
            except LimitError as error:
                raise InputError(f"--{group} cannot be used: {error}.") from error
            # What is no path and no YAML is the parser's to refuse.
            except (OSError, ValueError, yaml.YAMLError):
                continue


def _own_options(
    path: Path, contents: dict[str, Any], family: str, options: type[Recipe], show: Callable[[str], None]
) -> str:
    """A recipe file, as --recipe takes it: its path; its text without the options of other families if a run saved it.

    Raises:
        ConfigError: for such options in other files.
    """
    groups = frozenset().union(*(group_names(recipe_class(other)) for other in trainable()), group_names(options))
    known = set(option_names(options))
    others = [option for option, _ in flat(contents, groups) if option not in known and _owners(option)]
    if not is_saved(contents):
        if not others:
            return str(path)
        raise ConfigError(f"{path}: {_not_of(others[0], _owners(others[0]), family)}")
    for option in others:
        group, _, key = option.rpartition(".")
        values = contents[group] if group else contents
        del values[key]
        if group and not values:
            del contents[group]
    if others:
        show(f"{path}: left out {', '.join(others)}: not of the family {family}.")
    text: str = yaml.safe_dump(contents)
    return text


def _not_of(option: str, owners: Sequence[str], family: str) -> str:
    plural = "families" if len(owners) > 1 else "family"
    return f"--{option} is an option of the {plural} {' and '.join(owners)}, not of {family}."

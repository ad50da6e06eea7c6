"""`kvcapsule train`."""

import sys
from importlib.resources import files
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from kvcapsule.errors import CapsuleError, DataError, GeometryError, ModelError

from .fit import train
from .recipe import Recipe

DEFAULT_RECIPE = "cross-layer"
"""Recipe of `kvcapsule train` without arguments."""
_USAGE = "kvcapsule train [RECIPE] [--ratio R] [--model ID_OR_PATH] [--output DIR] [options]"


def main(argv: list[str] | None = None) -> int:
    """Train a capsule; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    recipe = words.pop(0) if words and not words[0].startswith("-") else DEFAULT_RECIPE
    try:
        parser = build_parser()
        values = parser.parse_args(["--recipe", str(find_recipe(recipe)), *words])
        values.pop("recipe", None)
        train(Recipe(**vars(parser.instantiate(values))))
    except (CapsuleError, DataError, GeometryError, ModelError, ValueError) as error:
        print(f"kvcapsule train: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> ArgumentParser:
    """Every field of Recipe as an option, explained by its docstring."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="kvcapsule train",
        usage=_USAGE,
        description=(
            "Train a capsule on the KV activations of a frozen VLM. RECIPE is a YAML file or the name of a shipped"
            f" recipe ({', '.join(shipped_recipes())}; default {DEFAULT_RECIPE}); options override its fields."
        ),
    )
    parser.add_argument("--recipe", action="config", help="a YAML file of these options (the same as RECIPE)")
    parser.add_class_arguments(Recipe, None)
    return parser


def shipped_recipes() -> list[str]:
    return sorted(
        p.name.removesuffix(".yaml") for p in files("kvcapsule.training.recipes").iterdir() if p.name.endswith(".yaml")
    )


def find_recipe(name: str) -> Path:
    """The YAML file of a recipe, given as a path or by its shipped name."""
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped_recipes():
        return Path(str(files("kvcapsule.training.recipes") / f"{name}.yaml"))
    raise ValueError(f"no recipe {name!r}: give a YAML file, or one of {', '.join(shipped_recipes())}.")

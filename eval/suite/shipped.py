"""Where suites are: files of people, and those that come with the package."""

from pathlib import Path

from kvcapsule.shipped_yaml import find_yaml, shipped_names

_PACKAGE = "kvcapsule.eval.suites"


def shipped_suites() -> list[str]:
    """Names of the suites that come with the package."""
    return shipped_names(_PACKAGE)


def name_of(suite: str) -> str:
    """The name of a suite that is given as a file or by its shipped name."""
    return Path(suite).name.removesuffix(".yaml")


def find_suite(name: str) -> Path:
    """The YAML file of a suite, given as a path or by its shipped name.

    Raises:
        InputError: if there is none.
    """
    return find_yaml(name, _PACKAGE, "suite")

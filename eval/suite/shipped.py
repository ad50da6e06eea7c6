"""Where suites are: files of people, and those that come with the package."""

from importlib.resources import files
from pathlib import Path

from kvcapsule.errors import InputError

_PACKAGE = "kvcapsule.eval.suites"


def shipped_suites() -> list[str]:
    """Names of the suites that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in files(_PACKAGE).iterdir() if path.name.endswith(".yaml"))


def name_of(suite: str) -> str:
    """The name of a suite that is given as a file or by its shipped name."""
    return Path(suite).name.removesuffix(".yaml")


def find_suite(name: str) -> Path:
    """The YAML file of a suite, given as a path or by its shipped name.

    Raises:
        InputError: if there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name not in shipped_suites():
        raise InputError(f"no suite {name!r}: give a YAML file, or one of {', '.join(shipped_suites())}.")
    return Path(str(files(_PACKAGE) / f"{name}.yaml"))

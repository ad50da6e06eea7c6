"""YAML files that come with a package (recipes, suites), beside those of people."""

from importlib.resources import files
from pathlib import Path

from .errors import InputError

_SUFFIX = ".yaml"


def shipped_names(package: str) -> list[str]:
    """Names of the YAML files in a package, without their suffix."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in files(package).iterdir() if file.name.endswith(_SUFFIX))


def find_yaml(name: str, package: str, kind: str) -> Path:
    """A YAML file, given as a path or by the name under which the package has it.

    Args:
        name: the path or the name.
        package: where shipped files are.
        kind: what the file holds, for the message.

    Raises:
        InputError: if there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in shipped_names(package):
        return Path(str(files(package) / f"{name}{_SUFFIX}"))
    raise InputError(f"no {kind} {name!r}: give a YAML file, or one of {', '.join(shipped_names(package))}.")

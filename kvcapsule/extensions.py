"""Policies and codec families of other packages, by name.

A package names them in its entry points, in the group `kvcapsule.policies` or `kvcapsule.families`; without an
installed package, "module:ATTRIBUTE" names one that Python can import. Nothing of them is imported before it is used.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")
V = TypeVar("V")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """kvcapsule's own policies or families, and those of other packages."""

    noun: str
    """Name of one of them in messages."""
    group: str
    """Of entry points."""
    builtin: dict[str, T]
    """kvcapsule's own."""
    expected: str
    """What an entry point must stand for, in messages."""
    accepts: Callable[[Any], bool]
    """Whether an object is one."""

    def find(self, name: str) -> T:
        """The one of this name: kvcapsule's own, of an entry point, or of "module:ATTRIBUTE".

        Raises:
            ConfigError: if there is none, if two packages have one of this name, or if its package cannot be imported.
        """
        installed = self._installed(name)
        if len(installed) + (name in self.builtin) > 1:
            owners = ["kvcapsule"] * (name in self.builtin) + [f"{_package(e)} ({e.value})" for e in installed]
            raise ConfigError(
                f"the {self.noun} {name!r} is one of {' and of '.join(owners)}: uninstall one, or have it renamed."
            )
        if name in self.builtin:
            return self.builtin[name]
        if installed:
            return self._load(installed[0])
        if ":" in name:
            return self._imported(name)
        near = get_close_matches(name, self.names(), n=1)
        raise ConfigError(
            f"there is no {self.noun} {name!r}; {f'did you mean {near[0]!r}? T' if near else 't'}here are"
            f" {', '.join(self.names())}. One of another package needs an entry point in the group {self.group}, or is"
            " given as module:ATTRIBUTE."
        )

    def add(self, name: str, thing: T) -> None:
        """Make one known by name in this process, without an entry point.

        Raises:
            ConfigError: if there is another one of this name.
        """
        if name in self.names() and self.find(name) is not thing:
            raise ConfigError(f"there is a {self.noun} {name!r} already: choose another name.")
        if not self._installed(name):
            self.builtin.setdefault(name, thing)

    def names(self) -> list[str]:
        """All names, kvcapsule's own first; nothing is imported for them."""
        return list(dict.fromkeys([*self.builtin, *(e.name for e in _entries(self.group, tuple(sys.path)))]))

    def package_of(self, name: str) -> str | None:
        """The installed package, as "name version", whose entry point has this name."""
        installed = self._installed(name)
        return _package(installed[0]) if installed else None

    def foreign(self) -> list[str]:
        """Names of other packages' entry points."""
        return [name for name in self.names() if self.is_foreign(name)]

    def is_foreign(self, name: str) -> bool:
        """Whether this names another package's: by an entry point, or as module:ATTRIBUTE."""
        return ":" in name or bool(self._installed(name))

    def _installed(self, name: str) -> list[EntryPoint]:
        return [entry for entry in _entries(self.group, tuple(sys.path)) if entry.name == name]

    def _load(self, entry: EntryPoint) -> T:
        try:
            loaded = entry.load()
        except Exception as error:
            raise ConfigError(
                f"the {self.noun} {entry.name!r} of the package {_package(entry)} cannot be loaded from {entry.value}"
                f" ({type(error).__name__}: {error}): update or uninstall the package."
            ) from error
        return self._checked(loaded, f"the {self.noun} {entry.name!r} of the package {_package(entry)}")

    def _imported(self, path: str) -> T:
        module, _, attribute = path.partition(":")
        try:
            loaded: Any = import_module(module)
            for part in attribute.split("."):
                loaded = getattr(loaded, part)
        except Exception as error:
            raise ConfigError(
                f"the {self.noun} {path!r} cannot be imported ({type(error).__name__}: {error}): write"
                " module:ATTRIBUTE, and install the module or add its folder to PYTHONPATH."
            ) from error
        return self._checked(loaded, f"the {self.noun} {path!r}")

    def _checked(self, loaded: Any, subject: str) -> T:
        if not self.accepts(loaded):
            raise ConfigError(f"{subject} is of type {type(loaded).__name__}, but {self.expected} is needed.")
        checked: T = loaded
        return checked


class Selection(Mapping[str, V], Generic[T, V]):
    """Some of a registry, by name: iteration gives kvcapsule's own alone; a look-up knows those of other packages, too.

    What a run does by default is thus the same whatever else is installed.
    """

    def __init__(self, registry: Registry[T], builtin: Mapping[str, V], select: Callable[[str, T], V | None]) -> None:
        """A selection.

        Args:
            registry: of policies or families.
            builtin: those selected of kvcapsule's own.
            select: of one of another package, by its name; None if it is not selected.
        """
        self._registry, self._builtin, self._select = registry, builtin, select

    def __getitem__(self, name: str) -> V:
        """Raises KeyError for one that is not selected, and ConfigError for one that cannot be imported."""
        if not self._registry.is_foreign(name):
            return self._builtin[name]
        selected = self._select(name, self._registry.find(name))
        if selected is None:
            raise KeyError(name)
        return selected

    def __iter__(self) -> Iterator[str]:
        return iter(self._builtin)

    def __len__(self) -> int:
        return len(self._builtin)


@cache
def _entries(group: str, path: tuple[str, ...]) -> EntryPoints:
    """Entry points of a group; path: where packages lie, all of which are read."""
    return entry_points(group=group)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unknown package"

"""A suite: options of `kvcapsule eval` and the methods to compare, at any number of compression ratios, in a YAML file.

    options:                                                    of `kvcapsule eval`; the command line overrides them
      data: {size: 400}
    entries:
      - {name: transform-20x, train: [transform, --compression, 20]}
                                                                a capsule, and the arguments of `kvcapsule train` for it
      - {pretrained: pages-vlm-transform, name: shipped}        a capsule that exists: shipped, a folder or on the Hub
      - {capsule: transform-20x, latent_bits: 4}                the capsule of an entry again, its latents in fewer bits
      - {capsule: shipped, text: {method: text-pruning, retention: 0.5}}
                                                                the same combined with a policy for the text
      - {method: evenly-spaced, compression: 5}                 a policy that keeps 5 times fewer tokens
      - {method: look-m, budget: 0.1, settings: {merge: none}}  a policy with a share of tokens, by the policy's own
                                                                name for it (retention or budget), and other settings
      - {method: snapkv, match: shipped+text-pruning}           a policy at the bytes (visual and text) of another entry
      - {method: all, match: shipped+text-pruning}              a row for every policy whose bytes can be chosen
      - {method: int3}                                          a policy whose bytes cannot be chosen

A capsule to train must have a name; the other entries are named after their method, unless they have a name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from kvcapsule.errors import InputError
from kvcapsule.yaml_files import read_yaml

from ..entries import FULL
from .entries import Spec
from .parser import read
from .shipped import find_suite, name_of

_DEFAULTS = {"timing": False}
"""Options of every suite unless it sets them: timing its many rows takes longer than all their answers."""


@dataclass(frozen=True)
class Suite:
    """The contents of a suite's file."""

    name: str
    """The file's name, without its suffix."""
    options: dict[str, Any]
    """Options of `kvcapsule eval`, nested as in the file; the command's parser checks them."""
    specs: tuple[Spec, ...]
    """Its entries."""

    def chosen(self, wanted: Sequence[str]) -> list[Spec]:
        """The entries of these names, or all where no name is given.

        Raises:
            InputError: for a name that no entry has.
        """
        names = [FULL, *(spec.name for spec in self.specs)]
        if unknown := [name for name in wanted if name not in names]:
            raise InputError(
                f"the suite {self.name} has no method {', '.join(map(repr, unknown))}; it has {', '.join(names)}."
            )
        return [spec for spec in self.specs if not wanted or spec.name in wanted]

    def capsules(self, chosen: Sequence[Spec]) -> list[Spec]:
        """The entries of the capsules that these entries need, and that the entries need whose bytes they match."""
        matched = {spec.matches for spec in chosen}
        read = {spec.reads for spec in self.specs if spec in chosen or spec.name in matched}
        return [spec for spec in self.specs if (spec.arguments or spec.place) and spec.name in read]


def load(name: str) -> Suite:
    """Read a suite, given as a file or by its shipped name.

    Raises:
        InputError: if there is none, or if it cannot be used; the message names the entry.
    """
    path = find_suite(name)
    try:
        return _suite(name_of(name), read_yaml(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, InputError) as error:
        raise InputError(f"the suite {name} cannot be used: {error}") from error


def _suite(name: str, values: Any) -> Suite:
    if not isinstance(values, dict):
        raise InputError("it is to have the keys options and entries.")
    if unknown := sorted(str(key) for key in values if key not in ("options", "entries")):
        raise InputError(f"unknown key {', '.join(unknown)}; it may have options and entries.")
    options, listed = values.get("options") or {}, values.get("entries")
    if not isinstance(options, dict) or "suite" in options:
        raise InputError("options: expected those of `kvcapsule eval`, --suite excepted, as keys and values.")
    if not isinstance(listed, list) or not listed:
        raise InputError("entries: expected a list of at least one.")
    numbered: list[tuple[int, Spec]] = []
    for number, entry in enumerate(listed, start=1):
        try:
            numbered += [(number, spec) for spec in read(entry)]
        except InputError as error:
            raise InputError(f"entry {number}: {error}") from error
    _require_consistent(numbered)
    return Suite(name, {**_DEFAULTS, **options}, tuple(spec for _, spec in numbered))


def _require_consistent(numbered: Sequence[tuple[int, Spec]]) -> None:
    names = {FULL}
    capsules = [spec.name for _, spec in numbered if spec.arguments or spec.place]
    yardsticks = [spec.name for _, spec in numbered if spec.matches is None]
    for number, spec in numbered:
        if spec.name in names:
            raise InputError(f"entry {number}: there is a row {spec.name!r} already, give this one another name.")
        names.add(spec.name)
        if spec.reads not in (None, *capsules):
            raise InputError(
                f"entry {number}: no entry is a capsule {spec.reads!r}; there are {', '.join(capsules) or 'none'}."
            )
        if spec.matches not in (None, *yardsticks):
            raise InputError(
                f"entry {number}: no entry {spec.matches!r} has bytes of its own to match; there are"
                f" {', '.join(yardsticks) or 'none'}."
            )

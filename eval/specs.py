"""The entries of a suite (kvcapsule.eval.suite shows one of each): what the file says of a row, and the method that it stands for."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from kvcapsule.capsule import Capsule
from kvcapsule.cli.errors import InputError
from kvcapsule.quantize import BITS

from .methods import FIXED, PRUNING, QUANTISATION, RIVALS, Entry, capsule_settings

Capsules = Mapping[str, tuple[str, Capsule]]
"""By the name of the entry that trains it: the capsule's place, and the capsule."""
_NAME = re.compile(r"\w[\w.+-]*")
_GIVEN = ("--model", "--revision", "--output")
"""Arguments of `kvcapsule train` that the run gives, not the suite."""


@dataclass(frozen=True, kw_only=True)
class Spec(ABC):
    """An entry. Its fields are the keys that it may have in the file."""

    name: str
    """Of its row."""

    @property
    def reads(self) -> str | None:
        """The entry whose capsule it reads."""
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of `kvcapsule train` that make the capsule of this entry, none if it makes none."""
        return ()

    @abstractmethod
    def entry(self, capsules: Capsules) -> Entry:
        """The row's method.

        Raises:
            InputError: if the capsule does not allow it.
        """


@dataclass(frozen=True, kw_only=True)
class Trained(Spec):
    """A capsule."""

    train: tuple[str, ...]

    @property
    def reads(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.train

    def entry(self, capsules: Capsules) -> Entry:
        place, capsule = capsules[self.name]
        family, ratio = capsule.config.family, _ratio(self.train)
        given = {} if ratio is None else {"ratio": ratio}
        return Entry(self.name, capsule, family, {"family": family, **given, **capsule_settings(place, capsule)})


@dataclass(frozen=True, kw_only=True)
class Requantised(Spec):
    """The capsule of another entry, its latents in fewer bits."""

    capsule: str
    latent_bits: int

    @property
    def reads(self) -> str:
        return self.capsule

    def entry(self, capsules: Capsules) -> Entry:
        place, capsule = capsules[self.capsule]
        try:
            codec = replace(capsule.config.codec, latent_bits=self.latent_bits)
        except ValueError as error:
            raise InputError(f"the entry {self.name}: {error}") from error
        # Built anew, as a codec may fit what it stores to the latents as they will be read; both hold the same parameters.
        twin = Capsule(replace(capsule.config, codec=codec))
        twin.load_state_dict(capsule.state_dict(), assign=True)
        twin.eval().requires_grad_(False)
        family = f"{capsule.config.family}+{QUANTISATION}"
        return Entry(self.name, twin, family, {"family": family, **capsule_settings(place, twin)})


@dataclass(frozen=True, kw_only=True)
class Pruned(Spec):
    """A policy that keeps 1 / ratio of the visual tokens."""

    method: str
    ratio: float

    def entry(self, capsules: Capsules) -> Entry:
        settings = {"family": PRUNING, "policy": self.method, "ratio": self.ratio}
        return Entry(self.name, RIVALS[self.method](1 / self.ratio), PRUNING, settings)


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """A policy that stores what it stores."""

    method: str

    def entry(self, capsules: Capsules) -> Entry:
        settings, policy = FIXED[self.method]
        return Entry(self.name, policy(), QUANTISATION, {"family": QUANTISATION, **settings})


def read(entry: Any) -> Spec:
    """An entry as the file has it.

    Raises:
        InputError: saying what is wrong with it.
    """
    if not isinstance(entry, dict):
        raise InputError(f"expected keys and values, found {entry!r}.")
    kinds = [key for key in _READERS if key in entry]
    if len(kinds) != 1:
        raise InputError(f"it has {' and '.join(kinds) or 'no kind'}: exactly one of {', '.join(_READERS)} says what it is.")
    spec = _READERS[kinds[0]](entry)
    if not _NAME.fullmatch(spec.name):
        raise InputError(f"name {spec.name!r}: it takes letters, digits and . + - _ alone, as it may also be a folder's.")
    return spec


def _trained(entry: Mapping[str, Any]) -> Spec:
    _require_known(entry, Trained)
    words = entry["train"]
    if "name" not in entry:
        raise InputError("a capsule needs a name.")
    if not isinstance(words, list) or not words or not all(isinstance(word, (str, int, float)) for word in words):
        raise InputError(f"train {words!r}: expected a list of arguments, such as [transform, --ratio, 20].")
    arguments = tuple(str(word).lower() if isinstance(word, bool) else str(word) for word in words)
    if given := [word for word in arguments if word.partition("=")[0] in _GIVEN]:
        raise InputError(f"train: {', '.join(given)} is given by the run, leave it out.")
    _ratio(arguments)
    return Trained(name=str(entry["name"]), train=arguments)


def _policy(entry: Mapping[str, Any]) -> Spec:
    method = str(entry["method"])
    if method in FIXED:
        _require_known(entry, Fixed)
        return Fixed(name=str(entry.get("name", method)), method=method)
    if method not in RIVALS:
        raise InputError(f"there is no method {method!r}; there are {', '.join([*RIVALS, *FIXED])}.")
    _require_known(entry, Pruned)
    ratio = entry.get("ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1:
        raise InputError(f"{method} takes a ratio of at least 1, visual tokens / kept ones; found {ratio!r}.")
    return Pruned(name=str(entry.get("name", f"{method}-{ratio:g}x")), method=method, ratio=float(ratio))


def _requantised(entry: Mapping[str, Any]) -> Spec:
    _require_known(entry, Requantised)
    capsule, bits = str(entry["capsule"]), entry.get("latent_bits")
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"latent_bits {bits!r}: choose one of {', '.join(map(str, BITS))}.")
    return Requantised(name=str(entry.get("name", f"{capsule}+int{bits}")), capsule=capsule, latent_bits=bits)


_READERS: dict[str, Callable[[Mapping[str, Any]], Spec]] = {"train": _trained, "method": _policy, "capsule": _requantised}
"""The key that tells what an entry is, and what reads the entry."""


def _ratio(arguments: tuple[str, ...]) -> float | None:
    """What --ratio says among arguments of `kvcapsule train`, None where it is left to the recipe."""
    for word, following in zip(arguments, (*arguments[1:], ""), strict=True):
        option, equals, value = word.partition("=")
        if option == "--ratio":
            try:
                return float(value if equals else following)
            except ValueError as error:
                raise InputError(f"train: --ratio {value if equals else following!r} is no number.") from error
    return None


def _require_known(entry: Mapping[Any, Any], kind: type[Spec]) -> None:
    known = [field.name for field in fields(kind)]
    if unknown := sorted(str(key) for key in entry if key not in known):
        raise InputError(f"unknown key {', '.join(unknown)}; an entry like this may have {', '.join(known)}.")

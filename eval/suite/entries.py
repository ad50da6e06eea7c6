"""The entries of a suite (kvcapsule.eval.suite.suite shows one of each), each with the method that it stands for."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import InputError
from kvcapsule.methods.method import Method
from kvcapsule.policy import Combined

from ..entries import (
    FIXED,
    PRUNING,
    QUANTISATION,
    TEXT,
    Entry,
    build,
    capsule_settings,
    family_of,
    fixed_entry,
    policy_settings,
)
from ..equal_bytes import Build

Capsules = Mapping[str, tuple[str, Capsule]]
"""By the name of the entry that makes it: the capsule's place, and the capsule."""


class Bench(NamedTuple):
    """What entries are made with."""

    capsules: Capsules
    match: Callable[[str, Build, str], Method]
    """match(row, build, name): what `build` makes, at the dial where it stores as many bytes as the row; the name is
    shown meanwhile."""


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
    def matches(self) -> str | None:
        """The entry whose bytes it is given."""
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Those of `kvcapsule train` that make the capsule of this entry, none if it makes none."""
        return ()

    @property
    def place(self) -> str | None:
        """What names the capsule of this entry, if it is one that is there already."""
        return None

    @abstractmethod
    def entry(self, bench: Bench) -> Entry:
        """The row's method.

        Raises:
            InputError: if the capsule does not allow it.
        """


@dataclass(frozen=True, kw_only=True)
class Trained(Spec):
    """A capsule that is trained where it is missing."""

    train: tuple[str, ...]

    @property
    def ratio(self) -> float | None:
        """What --ratio says, None where it is left to the recipe.

        Raises:
            InputError: if it is no number.
        """
        for word, following in zip(self.train, (*self.train[1:], ""), strict=True):
            option, equals, value = word.partition("=")
            if option == "--ratio":
                try:
                    return float(value if equals else following)
                except ValueError as error:
                    raise InputError(f"train: --ratio {value if equals else following!r} is no number.") from error
        return None

    @property
    def reads(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.train

    def entry(self, bench: Bench) -> Entry:
        place, capsule = bench.capsules[self.name]
        family = capsule.config.family
        given = {} if self.ratio is None else {"ratio": self.ratio if self.ratio <= 1 else 1 / self.ratio}
        return Entry(self.name, capsule, family, {"family": family, **given, **capsule_settings(place, capsule)})


@dataclass(frozen=True, kw_only=True)
class Pretrained(Spec):
    """A capsule that is there: a shipped name, a folder or an id on the Hub."""

    pretrained: str

    @property
    def reads(self) -> str:
        return self.name

    @property
    def place(self) -> str:
        return self.pretrained

    def entry(self, bench: Bench) -> Entry:
        place, capsule = bench.capsules[self.name]
        return Entry(
            self.name,
            capsule,
            capsule.config.family,
            {"family": capsule.config.family, **capsule_settings(place, capsule)},
        )


@dataclass(frozen=True, kw_only=True)
class Requantised(Spec):
    """The capsule of another entry, its latents in fewer bits."""

    capsule: str
    latent_bits: int

    @property
    def reads(self) -> str:
        return self.capsule

    def entry(self, bench: Bench) -> Entry:
        place, capsule = bench.capsules[self.capsule]
        try:
            codec = replace(capsule.config.codec, latent_bits=self.latent_bits)
        except ValueError as error:
            raise InputError(f"the entry {self.name}: {error}") from error
        # Built anew, as a codec may fit what it stores to the latents as they will be read; both hold the same
        # parameters.
        twin = Capsule(replace(capsule.config, codec=codec))
        twin.load_state_dict(capsule.state_dict(), assign=True)
        twin.eval().requires_grad_(False)
        family = f"{capsule.config.family}+{QUANTISATION}"
        return Entry(self.name, twin, family, {"family": family, **capsule_settings(place, twin)})


class Rule(NamedTuple):
    """A policy as an entry has it."""

    method: str
    dial: float | None
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Beside(Spec):
    """The capsule of another entry, and a policy for the text."""

    capsule: str
    text: Rule

    @property
    def reads(self) -> str:
        return self.capsule

    def entry(self, bench: Bench) -> Entry:
        place, capsule = bench.capsules[self.capsule]
        method, dial, settings = self.text
        policy = build(method, settings, dial, TEXT)
        family = f"{capsule.config.family}+{family_of(method, TEXT)}"
        shown = {"family": family, **capsule_settings(place, capsule), "text": policy_settings(method, policy)}
        return Entry(self.name, Combined(capsule, policy), family, shown)


@dataclass(frozen=True, kw_only=True)
class Dialled(Spec):
    """A policy that keeps a given share, or as many bytes as another entry."""

    method: str
    ratio: float | None = None
    """How many times less it keeps, 1 at least."""
    budget: float | None = None
    """The share that it keeps, in (0, 1]."""
    match: str | None = None
    """The entry whose bytes it is given."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the policy."""

    @property
    def matches(self) -> str | None:
        return self.match

    def entry(self, bench: Bench) -> Entry:
        shown: dict[str, Any] = {"family": PRUNING}
        if self.match is None:
            policy = build(self.method, self.settings, dial(self.ratio, self.budget))
        else:
            policy = bench.match(self.match, lambda share: build(self.method, self.settings, share), self.name)
            shown["matched_to"] = self.match
        return Entry(self.name, policy, PRUNING, {**shown, **policy_settings(self.method, policy)})


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """A policy that stores what it stores."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def entry(self, bench: Bench) -> Entry:
        policy, settings = FIXED.get(self.method, (self.method, {}))
        made = fixed_entry(self.name, policy, {**settings, **self.settings})
        return replace(made, settings={"family": QUANTISATION, **made.settings})


def dial(ratio: float | None, budget: float | None) -> float | None:
    """The share that is kept, however it was said."""
    return budget if ratio is None else 1 / ratio

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


class EntryContext(NamedTuple):
    """What the entries of a suite need to build their methods."""

    capsules: Capsules
    match: Callable[[str, Build, str], Method]
    """match(row, build, name): the method of `build` at the share of tokens with which it stores as many bytes as the
    row; the name is for the screen."""


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
        """The entry whose bytes it is matched to."""
        return None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `kvcapsule train` for the capsule of this entry; empty if it trains none."""
        return ()

    @property
    def place(self) -> str | None:
        """Name or folder of the capsule of this entry, if it exists already."""
        return None

    @abstractmethod
    def entry(self, context: EntryContext) -> Entry:
        """The row's method.

        Raises:
            InputError: if the capsule does not allow it.
        """


@dataclass(frozen=True, kw_only=True)
class Trained(Spec):
    """A capsule that is trained where it is missing."""

    train: tuple[str, ...]

    @property
    def compression(self) -> float | None:
        """The value of --compression, None where it is left to the recipe.

        Raises:
            InputError: if it is no number.
        """
        for word, following in zip(self.train, (*self.train[1:], ""), strict=True):
            option, equals, value = word.partition("=")
            if option == "--compression":
                try:
                    return float(value if equals else following)
                except ValueError as error:
                    raise InputError(
                        f"train: --compression {value if equals else following!r} is no number."
                    ) from error
        return None

    @property
    def reads(self) -> str:
        return self.name

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.train

    def entry(self, context: EntryContext) -> Entry:
        place, capsule = context.capsules[self.name]
        family = capsule.config.family
        settings = {} if self.compression is None else {"compression": self.compression}
        return Entry(self.name, capsule, family, {"family": family, **settings, **capsule_settings(place, capsule)})


@dataclass(frozen=True, kw_only=True)
class Pretrained(Spec):
    """A capsule that exists: a shipped name, a folder or an id on the Hub."""

    pretrained: str

    @property
    def reads(self) -> str:
        return self.name

    @property
    def place(self) -> str:
        return self.pretrained

    def entry(self, context: EntryContext) -> Entry:
        place, capsule = context.capsules[self.name]
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

    def entry(self, context: EntryContext) -> Entry:
        place, capsule = context.capsules[self.capsule]
        try:
            codec = replace(capsule.config.codec, latent_bits=self.latent_bits)
        except ValueError as error:
            raise InputError(f"the entry {self.name}: {error}") from error
        # Built anew, as a codec may fit what it stores to its quantised latents; both share the parameters.
        requantised = Capsule(replace(capsule.config, codec=codec))
        requantised.load_state_dict(capsule.state_dict(), assign=True)
        requantised.eval().requires_grad_(False)
        family = f"{capsule.config.family}+{QUANTISATION}"
        return Entry(self.name, requantised, family, {"family": family, **capsule_settings(place, requantised)})


class TextRule(NamedTuple):
    """A policy for the text as an entry has it."""

    method: str
    share: float | None
    """Of the text that it keeps, in (0, 1]; None for a policy that keeps all."""
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class WithTextPolicy(Spec):
    """The capsule of another entry, combined with a policy for the text."""

    capsule: str
    text: TextRule

    @property
    def reads(self) -> str:
        return self.capsule

    def entry(self, context: EntryContext) -> Entry:
        place, capsule = context.capsules[self.capsule]
        method, share, settings = self.text
        policy = build(method, settings, share, TEXT)
        family = f"{capsule.config.family}+{family_of(method, TEXT)}"
        shown = {"family": family, **capsule_settings(place, capsule), "text": policy_settings(method, policy)}
        return Entry(self.name, Combined(capsule, policy), family, shown)


@dataclass(frozen=True, kw_only=True)
class Pruned(Spec):
    """A policy that keeps a share of the tokens, or as many bytes as another entry."""

    method: str
    compression: float | None = None
    """How many times fewer tokens it keeps, at least 1: the inverse of its retention or budget."""
    retention: float | None = None
    """Share of the visual tokens that it keeps, in (0, 1]."""
    budget: float | None = None
    """Share of all tokens that it keeps, in (0, 1]."""
    match: str | None = None
    """The entry whose bytes it is matched to."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Other settings of the policy."""

    @property
    def matches(self) -> str | None:
        return self.match

    def entry(self, context: EntryContext) -> Entry:
        shown: dict[str, Any] = {"family": PRUNING}
        if self.match is None:
            policy = build(self.method, self.settings, share_of(self.compression, self.retention, self.budget))
        else:
            policy = context.match(self.match, lambda share: build(self.method, self.settings, share), self.name)
            shown["matched_to"] = self.match
        return Entry(self.name, policy, PRUNING, {**shown, **policy_settings(self.method, policy)})


@dataclass(frozen=True, kw_only=True)
class Fixed(Spec):
    """A policy whose bytes cannot be chosen."""

    method: str
    settings: dict[str, Any] = field(default_factory=dict)

    def entry(self, context: EntryContext) -> Entry:
        policy, settings = FIXED.get(self.method, (self.method, {}))
        entry = fixed_entry(self.name, policy, {**settings, **self.settings})
        return replace(entry, settings={"family": entry.family, **entry.settings})


def share_of(compression: float | None, retention: float | None, budget: float | None) -> float | None:
    """The share of tokens that is kept, from whichever of the three an entry has."""
    if compression is not None:
        return 1 / compression
    return budget if retention is None else retention

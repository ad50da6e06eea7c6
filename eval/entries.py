"""Which methods a run compares. All policies are those of kvcapsule.policy, where they are registered."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli.results import shown_path
from kvcapsule.errors import InputError
from kvcapsule.methods.method import Method
from kvcapsule.policy import POLICIES, TEXT_POLICIES, Policy

from .equal_bytes import PerLayer

FULL = "full"
"""The row of the full cache: in every run, as all others are measured against it."""
RIVALS = {name: policy for name, policy in POLICIES.items() if policy.budget_field is not None}
"""Policies with a dial, which is turned so that they store as many bytes as the first capsule."""
FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"int{bits}": ("quantized", {"bits": bits}) for bits in (8, 4, 3, 2)},
    **{f"kivi{bits}": ("kivi", {"bits": bits}) for bits in (4, 2)},
    **{
        name: (name, {})
        for name, policy in POLICIES.items()
        if policy.budget_field is None
        and name != FULL
        and all(p.default is not p.empty for p in signature(policy).parameters.values())
    },
}
"""Rows that store what they store: a policy without a dial, and its settings."""
TEXT: dict[str, type[Policy]] = {
    **TEXT_POLICIES,
    **{name: policy for name, policy in POLICIES.items() if policy.separable and policy.compresses_text},
}
"""What can see to the text beside a capsule: not what keeps all text raw."""
BY_DEFAULT = ("post-vision-attention", "evenly-spaced", "int4")
"""The training-free rows of a run that asks for none in particular."""
PRUNING, QUANTISATION = "token-pruning", "quantisation"
"""Families of policies with a dial and without; a capsule's is that of its codec."""


@dataclass(frozen=True)
class Entry:
    """A method that takes part in a run."""

    name: str
    """Of its row."""
    method: Method | None
    """None: the model's own cache and attention."""
    family: str
    """What kind of method it is; the rows of a kind are points of one curve."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What tells this setting of the method from another."""


def build(
    name: str, settings: Mapping[str, Any], dial: float | None = None, among: Mapping[str, type] = POLICIES
) -> Method:
    """A policy of these settings, its dial turned to `dial`.

    Raises:
        InputError: for a setting that it has not, or that cannot be.
    """
    policy: Any = among[name]
    known = [f.name for f in fields(policy) if f.name != policy.budget_field]
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{name} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(known) or 'none'}.")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if dial is not None:
        given[policy.budget_field] = dial
    try:
        made: Method = policy(**given)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error
    return made


def family_of(name: str, among: Mapping[str, Any] = POLICIES) -> str:
    return QUANTISATION if among[name].budget_field is None else PRUNING


def open_capsules(names: Sequence[str]) -> dict[str, tuple[str, Capsule]]:
    """Load capsules; by row: the name that was given, and the capsule.

    A row is named after the family; where several capsules are of one family, the capsule's own name follows.

    Raises:
        CapsuleError: if one cannot be loaded.
        InputError: if two would have the same row.
    """
    loaded = [(name, Capsule.from_pretrained(name)) for name in names]
    families = Counter(capsule.config.family for _, capsule in loaded)
    rows: dict[str, tuple[str, Capsule]] = {}
    for name, capsule in loaded:
        family = capsule.config.family
        row = family if families[family] == 1 else f"{family}:{Path(name).name}"
        if row in rows:
            raise InputError(
                f"two capsules are called {row!r} ({rows[row][0]} and {name}): leave one out, or rename its folder."
            )
        rows[row] = (name, capsule)
    return rows


def chosen(wanted: Sequence[str], capsule_rows: Iterable[str]) -> list[str]:
    """The rows of a run besides the full cache's, in their order; the capsules and BY_DEFAULT where nothing is wanted
    in particular.

    Raises:
        InputError: for a method that there is not.
    """
    capsule_rows = list(capsule_rows)
    available = [*capsule_rows, *RIVALS, *FIXED]
    for name in wanted:
        if name not in (FULL, *available):
            raise InputError(f"there is no method {name!r}; this run has {', '.join([FULL, *available])}.")
    return [name for name in available if name in (wanted or (*capsule_rows, *BY_DEFAULT))]


def entries(
    rows: Sequence[str],
    capsules: Mapping[str, tuple[str, Capsule]],
    turned: Callable[[str], Method],
    matched_to: str | None,
) -> list[Entry]:
    """The full cache and the methods named by `rows`.

    Args:
        rows: what `chosen` gave.
        capsules: what `open_capsules` gave, on the model's device.
        turned: makes a policy of RIVALS by its name, with the dial where the run wants it.
        matched_to: the row of the capsule whose bytes that matches; None if the dial was given by hand.
    """
    found = [full_entry()]
    for row in rows:
        if row in capsules:
            name, capsule = capsules[row]
            found.append(Entry(row, capsule, capsule.config.family, capsule_settings(name, capsule)))
        elif row in RIVALS:
            method = turned(row)
            matched = {} if matched_to is None else {"matched_to": matched_to}
            found.append(Entry(row, method, PRUNING, {**policy_settings(row, method), **matched}))
        else:
            found.append(fixed_entry(row, *FIXED[row]))
    return found


def full_entry() -> Entry:
    """The full cache."""
    return Entry(FULL, None, FULL)


def fixed_entry(row: str, name: str, settings: Mapping[str, Any]) -> Entry:
    """A policy without a dial."""
    policy = build(name, settings)
    return Entry(row, policy, QUANTISATION, policy_settings(name, policy))


def capsule_settings(name: str, capsule: Capsule) -> dict[str, Any]:
    """A capsule's name and the sizes of its codec."""
    return {"capsule": shown_path(name), **{k: _short(v) for k, v in asdict(capsule.config.codec).items()}}


def policy_settings(name: str, method: Method) -> dict[str, Any]:
    """A policy's name and its fields; of one that differs by layer, a list of what differs."""
    policies: Sequence[Any] = method.methods if isinstance(method, PerLayer) else [method]
    return {
        "policy": name,
        **{f.name: _by_layer([getattr(policy, f.name) for policy in policies]) for f in fields(policies[0])},
    }


def _short(value: Any) -> Any:
    """A list with an item for each layer: the item alone, where all are equal."""
    return _by_layer(value) if isinstance(value, (list, tuple)) and value else value


def _by_layer(values: Sequence[Any]) -> Any:
    values = [list(value) if isinstance(value, tuple) else value for value in values]
    return values[0] if all(value == values[0] for value in values) else values

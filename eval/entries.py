"""The methods that a run compares: capsules, and the policies registered in kvcapsule.policy."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from inspect import signature
from pathlib import Path
from typing import Any

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli.results import shown_path
from kvcapsule.errors import InputError
from kvcapsule.extensions import Selection
from kvcapsule.methods.method import Method
from kvcapsule.methods.shown_names import known_name
from kvcapsule.policy import POLICIES, REGISTRY, TEXT_POLICIES, Policy

from .equal_bytes import PerLayer

FULL = "full"
"""The row of the full cache, which every run has, as all others are compared with it."""
RIVALS = Selection(
    REGISTRY,
    {name: policy for name, policy in POLICIES.items() if policy.budget_field is not None},
    lambda _, policy: policy if policy.budget_field is not None else None,
)
"""Policies with a setting for how much they keep, which can be matched to the bytes of another method."""
_FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"int{bits}": ("quantized", {"bits": bits}) for bits in (8, 4, 3, 2)},
    **{f"kivi{bits}": ("kivi", {"bits": bits}) for bits in (4, 2)},
    **{f"turboquant{bits}": ("turboquant", {"bits": bits}) for bits in (4, 3, 2)},
    **{
        name: (name, {})
        for name, policy in POLICIES.items()
        if policy.budget_field is None
        and name != FULL
        and all(p.default is not p.empty for p in signature(policy).parameters.values())
    },
}
FIXED: Selection[type[Policy], tuple[str, dict[str, Any]]] = Selection(
    REGISTRY, _FIXED, lambda name, policy: (name, {}) if policy.budget_field is None else None
)
"""Rows whose bytes cannot be chosen: a policy without such a setting, and its other settings."""
ALL: Selection[type[Policy], type[Policy]] = Selection(REGISTRY, POLICIES, lambda _, policy: policy)
"""Every policy."""
TEXT: Selection[type[Policy], type[Policy]] = Selection(
    REGISTRY,
    {
        **TEXT_POLICIES,
        **{name: policy for name, policy in POLICIES.items() if policy.separable and policy.compresses_text},
    },
    lambda _, policy: policy if policy.separable and policy.compresses_text else None,
)
"""Policies for the text that can be combined with a capsule: those that do not keep all text raw."""
BY_DEFAULT = ("post-vision-attention", "evenly-spaced", "int4")
"""The training-free rows of a run without --methods."""
PRUNING, QUANTISATION = "token-pruning", "quantisation"
"""Families of the policies that drop tokens, and of those that keep all in fewer bits; the family of a capsule is that
of its codec."""


@dataclass(frozen=True)
class Entry:
    """One of the methods that a run compares, with the name of its row."""

    name: str
    """Name of its row."""
    method: Method | None
    """None: the model's own cache and attention."""
    family: str
    """Kind of the method; the rows of a kind are points of one curve."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that distinguish this row from others of the method."""


def build(
    name: str, settings: Mapping[str, Any], share: float | None = None, among: Mapping[str, type] = ALL
) -> Method:
    """A policy with these settings.

    Args:
        name: of the policy.
        settings: by name of the field.
        share: of the tokens that it keeps; None for a policy without such a setting.
        among: the policies by name.

    Raises:
        InputError: for an unknown setting, or a value that it cannot have.
    """
    policy: Any = among[name]
    known = [f.name for f in fields(policy) if f.name != policy.budget_field]
    if unknown := [key for key in settings if key not in known]:
        raise InputError(f"{name} has no setting {', '.join(map(repr, unknown))}; it has {', '.join(known) or 'none'}.")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    if share is not None:
        values[policy.budget_field] = share
    try:
        method: Method = policy(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from error
    return method


def family_of(name: str, among: Mapping[str, Any] = ALL) -> str:
    """The family of a policy: PRUNING where it says how much it keeps or drops tokens otherwise, else QUANTISATION."""
    policy = among[name]
    return PRUNING if policy.budget_field is not None or policy.drops_tokens else QUANTISATION


def open_capsules(names: Sequence[str]) -> dict[str, tuple[str, Capsule]]:
    """Load capsules: by row, the name in `names` and the capsule.

    A row is named after the family; if several capsules are of one family, the capsule's name follows.

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
    """The rows of a run without the full cache's, in order; without `wanted` the capsules and BY_DEFAULT.

    Raises:
        InputError: for an unknown method.
    """
    capsule_rows, wanted = list(capsule_rows), [known_name(name) for name in wanted]
    available = [*capsule_rows, *RIVALS, *FIXED]
    available += [name for name in wanted if name not in available and (name in RIVALS or name in FIXED)]
    for name in wanted:
        if name not in (FULL, *available):
            raise InputError(f"there is no method {name!r}; this run has {', '.join([FULL, *available])}.")
    return [name for name in available if name in (wanted or (*capsule_rows, *BY_DEFAULT))]


def entries(
    rows: Sequence[str],
    capsules: Mapping[str, tuple[str, Capsule]],
    build_policy: Callable[[str], Method],
    matched_to: str | None,
) -> list[Entry]:
    """The full cache and the methods named by `rows`.

    Args:
        rows: as from `chosen`.
        capsules: as from `open_capsules`, on the model's device.
        build_policy: builds a policy of RIVALS that keeps as much as the run wants.
        matched_to: the row of the capsule whose bytes the policies match; None if the run has a budget.
    """
    result = [full_entry()]
    for row in rows:
        if row in capsules:
            name, capsule = capsules[row]
            result.append(Entry(row, capsule, capsule.config.family, capsule_settings(name, capsule)))
        elif row in RIVALS:
            method = build_policy(row)
            matched = {} if matched_to is None else {"matched_to": matched_to}
            result.append(Entry(row, method, PRUNING, {**policy_settings(row, method), **matched}))
        else:
            result.append(fixed_entry(row, *FIXED[row]))
    return result


def full_entry() -> Entry:
    """The entry of the full cache."""
    return Entry(FULL, None, FULL)


def fixed_entry(row: str, name: str, settings: Mapping[str, Any]) -> Entry:
    """The entry of a policy whose bytes cannot be chosen."""
    policy = build(name, settings)
    return Entry(row, policy, family_of(name), policy_settings(name, policy))


def capsule_settings(name: str, capsule: Capsule) -> dict[str, Any]:
    """A capsule's name and the sizes of its codec."""
    return {"capsule": shown_path(name), **{k: _short(v) for k, v in asdict(capsule.config.codec).items()}}


def policy_settings(name: str, method: Method) -> dict[str, Any]:
    """A policy's name and its fields; a field that differs by layer is a list."""
    policies: Sequence[Any] = method.methods if isinstance(method, PerLayer) else [method]
    return {
        "policy": name,
        **{f.name: _by_layer([getattr(policy, f.name) for policy in policies]) for f in fields(policies[0])},
    }


def _short(value: Any) -> Any:
    """One item in place of a list of equal items for all layers."""
    return _by_layer(value) if isinstance(value, (list, tuple)) and value else value


def _by_layer(values: Sequence[Any]) -> Any:
    values = [list(value) if isinstance(value, tuple) else value for value in values]
    return values[0] if all(value == values[0] for value in values) else values

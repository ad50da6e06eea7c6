"""What a suite's file may say of an entry, read into a Spec."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvcapsule.errors import InputError
from kvcapsule.policy import POLICIES
from kvcapsule.segments.quantized_rows import BITS

from ..entries import FIXED, FULL, RIVALS, TEXT, build
from .entries import Beside, Dialled, Fixed, Pretrained, Requantised, Rule, Spec, Trained, dial

_NAME = re.compile(r"\w[\w.+@-]*")
_GIVEN = ("--model", "--revision", "--output")
"""Arguments of `kvcapsule train` that the run gives, not the suite."""
ALL = "all"
"""In place of a method's name: every policy with a dial."""


def read(entry: Any) -> list[Spec]:
    """An entry as the file has it: one row, or for `method: all` one for each policy.

    Raises:
        InputError: saying what is wrong with it.
    """
    if not isinstance(entry, dict):
        raise InputError(f"expected keys and values, found {entry!r}.")
    kinds = [key for key in _READERS if key in entry]
    if len(kinds) != 1:
        raise InputError(
            f"it has {' and '.join(kinds) or 'no kind'}: exactly one of {', '.join(_READERS)} says what it is."
        )
    if entry.get("method") == ALL:
        if "name" in entry or "settings" in entry:
            raise InputError("method all stands for several rows, which have their own names and settings.")
        return [spec for name in RIVALS for spec in read({**entry, "method": name})]
    spec = _READERS[kinds[0]](entry)
    if not _NAME.fullmatch(spec.name):
        raise InputError(
            f"name {spec.name!r}: it takes letters, digits and . + @ - _ alone, as it may also be a folder's."
        )
    return [spec]


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
    spec = Trained(name=str(entry["name"]), train=arguments)
    # Said now, not behind the training.
    _ = spec.ratio
    return spec


def _pretrained(entry: Mapping[str, Any]) -> Spec:
    _require_known(entry, Pretrained)
    place = str(entry["pretrained"])
    return Pretrained(name=str(entry.get("name", Path(place).name)), pretrained=place)


def _policy(entry: Mapping[str, Any]) -> Spec:
    method, settings = str(entry["method"]), _settings(entry)
    if method in RIVALS:
        _require_known(entry, Dialled)
        ratio, budget, match = _amount(method, entry)
        if match is None:
            build(method, settings, dial(ratio, budget))
        suffix = f"-{ratio:g}x" if ratio is not None else f"-{budget:g}" if budget is not None else f"@{match}"
        name = str(entry.get("name", method + suffix))
        return Dialled(name=name, method=method, settings=settings, ratio=ratio, budget=budget, match=match)
    if method not in FIXED and (method not in POLICIES or method == FULL):
        raise InputError(
            f"there is no method {method!r}; there are {', '.join(dict.fromkeys([*RIVALS, *FIXED, *POLICIES]))}."
        )
    _require_known(entry, Fixed)
    spec = Fixed(name=str(entry.get("name", method)), method=method, settings=settings)
    policy, given = FIXED.get(method, (method, {}))
    build(policy, {**given, **settings})
    return spec


def _derived(entry: Mapping[str, Any]) -> Spec:
    """What is made of the capsule of another entry."""
    capsule = str(entry["capsule"])
    if "text" in entry:
        _require_known(entry, Beside)
        rule = _text(entry["text"])
        return Beside(name=str(entry.get("name", f"{capsule}+{rule.method}")), capsule=capsule, text=rule)
    _require_known(entry, Requantised)
    bits = entry.get("latent_bits")
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"latent_bits {bits!r}: choose one of {', '.join(map(str, BITS))}; or give a text.")
    return Requantised(name=str(entry.get("name", f"{capsule}+int{bits}")), capsule=capsule, latent_bits=bits)


def _text(values: Any) -> Rule:
    if not isinstance(values, dict) or "method" not in values:
        raise InputError(f"text {values!r}: expected a policy, such as {{method: text-pruning, budget: 0.5}}.")
    if unknown := sorted(str(key) for key in values if key not in ("method", "ratio", "budget", "settings")):
        raise InputError(f"text: unknown key {', '.join(unknown)}; it may have method, ratio, budget, settings.")
    method, settings = str(values["method"]), _settings(values)
    if method not in TEXT:
        raise InputError(f"text: there is no method {method!r} for text; there are {', '.join(TEXT)}.")
    share = None
    if TEXT[method].budget_field is None:
        if given := [key for key in ("ratio", "budget") if key in values]:
            raise InputError(f"text: {method} has no dial that {' or '.join(given)} could turn.")
    else:
        ratio, budget, _ = _amount(method, values)
        share = dial(ratio, budget)
    build(method, settings, share, TEXT)
    return Rule(method, share, settings)


_READERS: dict[str, Callable[[Mapping[str, Any]], Spec]] = {
    "train": _trained,
    "pretrained": _pretrained,
    "method": _policy,
    "capsule": _derived,
}
"""The key that tells what an entry is, and what reads the entry."""


def _amount(method: str, entry: Mapping[str, Any]) -> tuple[float | None, float | None, str | None]:
    """How much a policy keeps, as the entry says it: ratio, budget, match."""
    ratio, budget, match = (entry.get(key) for key in ("ratio", "budget", "match"))
    if sum(value is not None for value in (ratio, budget, match)) != 1:
        raise InputError(
            f"{method} takes a ratio of at least 1 (how many times less it keeps), or a budget in (0, 1] (the share"
            " that it keeps), or the entry that its bytes are to match; exactly one of them."
        )
    for value, least, most, wanted in ((ratio, 1, math.inf, "ratio of at least 1"), (budget, 0, 1, "budget in (0, 1]")):
        if value is not None and not (type(value) in (int, float) and least <= value <= most and value > 0):
            raise InputError(f"{method} takes a {wanted}; found {value!r}.")
    return ratio, budget, None if match is None else str(match)


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    settings = entry.get("settings") or {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"settings {settings!r}: expected keys and values, those of the policy.")
    return settings


def _require_known(entry: Mapping[Any, Any], kind: type[Spec]) -> None:
    known = [f.name for f in fields(kind)]
    if unknown := sorted(str(key) for key in entry if key not in known):
        raise InputError(f"unknown key {', '.join(unknown)}; an entry like this may have {', '.join(known)}.")

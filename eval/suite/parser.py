"""Parser of a suite's YAML file: its entries as Specs (see suite/entries.py)."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from kvcapsule.cli.options import require_current_words
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.policy import POLICIES
from kvcapsule.segments.quantized_rows import BITS

from ..entries import FIXED, FULL, RIVALS, TEXT, build
from .entries import Fixed, Pretrained, Pruned, Requantised, Spec, TextRule, Trained, WithTextPolicy, share_of

_NAME = re.compile(r"\w[\w.+@-]*")
_SET_BY_RUN = ("--model", "--revision", "--output")
"""Arguments of `kvcapsule train` that the run sets, not the suite."""
ALL = "all"
"""In place of a method's name: every policy whose bytes can be chosen."""
_SHARES = ("compression", "retention", "budget")
"""Keys that say how much a policy keeps."""
_RENAMED = {
    "ratio": "ratio is compression now, how many times fewer tokens are kept (ratio: 5 is compression: 5); a share is"
    " said by the policy's own setting, retention or budget."
}
"""Keys of an entry that no longer exist, and the sentence that refuses them."""
_RENAMED_OPTIONS = {
    "ratio": "train: --ratio is --compression now, how many times fewer bytes: give 20 where --ratio was 20 or 0.05."
}


def read(entry: Any) -> list[Spec]:
    """An entry as the file has it: one row, or for `method: all` one for each policy.

    Raises:
        InputError: saying what is wrong with it.
    """
    if not isinstance(entry, dict):
        raise InputError(f"expected keys and values, not {entry!r}.")
    for key in (key for part in (entry, entry.get("text")) if isinstance(part, dict) for key in part):
        if key in _RENAMED:
            raise InputError(_RENAMED[key])
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
        raise InputError(f"train {words!r}: expected a list of arguments, such as [transform, --compression, 20].")
    arguments = tuple(str(word).lower() if isinstance(word, bool) else str(word) for word in words)
    if set_by_run := [word for word in arguments if word.partition("=")[0] in _SET_BY_RUN]:
        raise InputError(f"train: {', '.join(set_by_run)} is given by the run, leave it out.")
    try:
        require_current_words(arguments, _RENAMED_OPTIONS)
    except ConfigError as error:
        raise InputError(str(error)) from error
    spec = Trained(name=str(entry["name"]), train=arguments)
    # Refused now, not after the training.
    _ = spec.compression
    return spec


def _pretrained(entry: Mapping[str, Any]) -> Spec:
    _require_known(entry, Pretrained)
    place = str(entry["pretrained"])
    return Pretrained(name=str(entry.get("name", Path(place).name)), pretrained=place)


def _policy(entry: Mapping[str, Any]) -> Spec:
    method, settings = str(entry["method"]), _settings(entry)
    if method in RIVALS:
        _require_known(entry, Pruned)
        shares, match = _amount(method, RIVALS, entry)
        share = share_of(*shares)
        if match is None:
            build(method, settings, share)
        compression, retention, budget = shares
        suffix = f"@{match}" if share is None else f"-{share:g}" if compression is None else f"-{compression:g}x"
        return Pruned(
            name=str(entry.get("name", method + suffix)),
            method=method,
            settings=settings,
            compression=compression,
            retention=retention,
            budget=budget,
            match=match,
        )
    if method not in FIXED and (method not in POLICIES or method == FULL):
        raise InputError(
            f"there is no method {method!r}; there are {', '.join(dict.fromkeys([*RIVALS, *FIXED, *POLICIES]))}."
        )
    _require_known(entry, Fixed)
    spec = Fixed(name=str(entry.get("name", method)), method=method, settings=settings)
    policy, defaults = FIXED.get(method, (method, {}))
    build(policy, {**defaults, **settings})
    return spec


def _derived(entry: Mapping[str, Any]) -> Spec:
    """A capsule of another entry, with a text policy or with its latents in fewer bits."""
    capsule = str(entry["capsule"])
    if "text" in entry:
        _require_known(entry, WithTextPolicy)
        rule = _text(entry["text"])
        return WithTextPolicy(name=str(entry.get("name", f"{capsule}+{rule.method}")), capsule=capsule, text=rule)
    _require_known(entry, Requantised)
    bits = entry.get("latent_bits")
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"latent_bits {bits!r}: choose one of {', '.join(map(str, BITS))}; or give a text.")
    return Requantised(name=str(entry.get("name", f"{capsule}+int{bits}")), capsule=capsule, latent_bits=bits)


def _text(values: Any) -> TextRule:
    if not isinstance(values, dict) or "method" not in values:
        raise InputError(f"text {values!r}: expected a policy, such as {{method: text-pruning, retention: 0.5}}.")
    known = ("method", *_SHARES, "settings")
    if unknown := sorted(str(key) for key in values if key not in known):
        raise InputError(f"text: unknown key {', '.join(unknown)}; it may have {', '.join(known)}.")
    method, settings = str(values["method"]), _settings(values)
    if method not in TEXT:
        raise InputError(f"text: there is no method {method!r} for text; there are {', '.join(TEXT)}.")
    share = None
    if TEXT[method].budget_field is None:
        if shares := [key for key in _SHARES if key in values]:
            raise InputError(f"text: {method} has no setting for how much it keeps: leave {' and '.join(shares)} out.")
    else:
        share = share_of(*_amount(method, TEXT, values)[0])
    build(method, settings, share, TEXT)
    return TextRule(method, share, settings)


_READERS: dict[str, Callable[[Mapping[str, Any]], Spec]] = {
    "train": _trained,
    "pretrained": _pretrained,
    "method": _policy,
    "capsule": _derived,
}
"""The key that tells what an entry is, and what reads the entry."""


Shares = tuple[float | None, float | None, float | None]


def _amount(method: str, among: Mapping[str, Any], entry: Mapping[str, Any]) -> tuple[Shares, str | None]:
    """How much a policy keeps, as the entry says it: (compression, retention, budget), and the entry to match.

    Exactly one of the four is not None.
    """
    share_field = among[method].budget_field
    compression, retention, budget = (entry.get(key) for key in _SHARES)
    match = entry.get("match")
    if sum(value is not None for value in (compression, retention, budget, match)) != 1:
        raise InputError(
            f"{method} takes a compression of at least 1 (how many times fewer tokens it keeps), or a {share_field} in"
            " (0, 1] (the share that it keeps), or match, the entry whose bytes it is to store; exactly one of them."
        )
    for name, value in (("retention", retention), ("budget", budget)):
        if value is not None and name != share_field:
            raise InputError(f"{method} has no {name}: the share that it keeps is its {share_field}.")
    for value, least, most, wanted in (
        (compression, 1, math.inf, "compression of at least 1"),
        (retention, 0, 1, "retention in (0, 1]"),
        (budget, 0, 1, "budget in (0, 1]"),
    ):
        if value is not None and not (type(value) in (int, float) and least <= value <= most and value > 0):
            raise InputError(f"{method} takes a {wanted}; found {value!r}.")
    return (compression, retention, budget), None if match is None else str(match)


def _settings(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an entry; raises InputError where they are no mapping of names to values."""
    settings = entry.get("settings") or {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise InputError(f"settings {settings!r}: expected keys and values, those of the policy.")
    return settings


def _require_known(entry: Mapping[Any, Any], kind: type[Spec]) -> None:
    known = [f.name for f in fields(kind)]
    if unknown := sorted(str(key) for key in entry if key not in known):
        raise InputError(f"unknown key {', '.join(unknown)}; an entry like this may have {', '.join(known)}.")

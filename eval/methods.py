"""Which methods a run compares. RIVALS and FIXED are the one place where a training-free one is registered."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from kvcapsule.capsule import Capsule
from kvcapsule.cli.errors import InputError
from kvcapsule.policy import (
    H2O,
    EvenlySpaced,
    Kivi,
    PostVisionAttention,
    PyramidKV,
    Quantized,
    Random,
    SnapKV,
    StreamingLLM,
    VisualPolicy,
)
from kvcapsule.prefill import Compressed, LayerPrefill, Method

FULL = "full"
"""The row of the full cache: in every run, as all others are measured against it."""
RIVALS: dict[str, Callable[[float], VisualPolicy]] = {
    "post-vision-attention": PostVisionAttention,
    "evenly-spaced": EvenlySpaced,
    "random": Random,
    "streaming-llm": StreamingLLM,
    "snapkv": SnapKV,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
}
"""Policies with a retention ratio, which is chosen so that they store as many visual bytes as the first capsule."""
FIXED: dict[str, tuple[dict[str, Any], Callable[[], VisualPolicy]]] = {
    **{f"int{bits}": ({"bits": bits}, partial(Quantized, bits)) for bits in (8, 4, 3, 2)},
    **{f"kivi{bits}": ({"policy": "kivi", "bits": bits}, partial(Kivi, bits)) for bits in (4, 2)},
}
"""Policies that store what they store, with their settings."""
BY_DEFAULT = ("post-vision-attention", "evenly-spaced", "int4")
"""The training-free rows of a run that asks for none in particular."""
PRUNING, QUANTISATION = "token-pruning", "quantisation"
"""Families of RIVALS and of FIXED; a capsule's is that of its codec."""


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


class PerLayer:
    """A policy for each layer of the model, so that bytes can be matched finer than by one token in every layer."""

    def __init__(self, policies: Sequence[VisualPolicy]) -> None:
        self.policies = policies

    def compress(self, prefill: LayerPrefill) -> Compressed:
        return self.policies[prefill.layer].compress(prefill)


def rival(name: str, ratios: Sequence[float]) -> Method:
    """A policy of RIVALS whose layers keep these ratios; one that spreads its budget over the layers itself keeps their mean."""
    if RIVALS[name] is PyramidKV:
        return PyramidKV(fmean(ratios), layers=len(ratios))
    return PerLayer([RIVALS[name](ratio) for ratio in ratios])


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
            raise InputError(f"two capsules are called {row!r} ({rows[row][0]} and {name}): leave one out, or rename its folder.")
        rows[row] = (name, capsule)
    return rows


def chosen(wanted: Sequence[str], capsule_rows: Iterable[str]) -> list[str]:
    """The rows of a run besides the full cache's, in their order; the capsules and BY_DEFAULT where nothing is wanted in particular.

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
    rows: Sequence[str], capsules: Mapping[str, tuple[str, Capsule]], ratios: Sequence[float], matched_to: str | None
) -> list[Entry]:
    """The full cache and the methods named by `rows`.

    Args:
        rows: what `chosen` gave.
        capsules: what `open_capsules` gave, on the model's device.
        ratios: retention ratio of the rivals, layer by layer (not read if no rival takes part).
        matched_to: the row of the capsule whose bytes the ratios match; None if the ratio was given by hand.
    """
    found = [full_entry()]
    for row in rows:
        if row in capsules:
            name, capsule = capsules[row]
            found.append(Entry(row, capsule, capsule.config.family, capsule_settings(name, capsule)))
        elif row in RIVALS:
            settings = {"ratio": _short([round(r, 4) for r in ratios])}
            if matched_to is not None:
                settings["matched_to"] = matched_to
            found.append(Entry(row, rival(row, ratios), PRUNING, settings))
        else:
            settings, policy = FIXED[row]
            found.append(Entry(row, policy(), QUANTISATION, dict(settings)))
    return found


def full_entry() -> Entry:
    """The full cache."""
    return Entry(FULL, None, FULL)


def capsule_settings(name: str, capsule: Capsule) -> dict[str, Any]:
    """A capsule's name and the sizes of its codec."""
    return {"capsule": shown_path(name), **{k: _short(v) for k, v in asdict(capsule.config.codec).items()}}


def shown_path(name: str) -> str:
    """A name as a report may show it: where it is an absolute path, relative to the working directory, or else its last part."""
    path = Path(name).expanduser()
    if not path.is_absolute():
        return name
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else path.name


def _short(value: Any) -> Any:
    """A list of equal values, one for each layer, as this value."""
    if isinstance(value, (list, tuple)) and value and all(v == value[0] for v in value):
        return value[0]
    return list(value) if isinstance(value, tuple) else value

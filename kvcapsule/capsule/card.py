"""Model card of a capsule: README.md with front matter for the Hub, usage, measurements and recipe."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ..atomic_files import to_yaml
from .config import CapsuleConfig

CARD_TAGS = ["kv-cache", "compression", "vision-language"]
LICENSE = "apache-2.0"
LIBRARY = "kvcapsule"
CARD_LOADS = re.compile(r'Capsule\.from_pretrained\("(?P<name>[^"\n]*)"\)')
MEASURED_TITLE = "## Measured"
CARD_MEASURED = re.compile(rf"^{MEASURED_TITLE}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def model_card(
    config: CapsuleConfig, recipe: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None, name: str | None = None
) -> str:
    """Text of a capsule's README.md: front matter for the Hub, usage, measurements, and recipe.

    Args:
        config: the capsule's config.
        recipe: see kvcapsule.capsule.write.save_folder.
        metrics: see kvcapsule.capsule.write.save_folder. Without rows of an evaluation the card says that nothing was
            measured.
        name: the name to pass to `from_pretrained`; by default the base model's name and the family.
    """
    name = name or f"{config.base_model.rpartition('/')[2]}-{config.family}"
    data = ModelCardData(
        # The Hub refuses a base_model that is not an id, e.g. the path of a folder. The text below names it anyway.
        base_model=config.base_model if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", config.base_model) else None,
        library_name=LIBRARY,
        license=LICENSE,
        tags=CARD_TAGS,
    )
    at = f" at revision `{config.base_revision}`" if config.base_revision else ""
    recipe_text = f"```yaml\n{to_yaml(recipe)}```" if recipe else "No recipe was saved with this capsule."
    return f"""---
{data.to_yaml()}
---

# {name}

A capsule for `{config.base_model}`{at}: codecs of the family `{config.family}` that store the visual part of its KV \
cache as latents, which
attention reads as they are.

## Use

```python
from kvcapsule import Capsule, attach
with attach(model, Capsule.from_pretrained("{name}")):
    output = model.generate(**inputs)
```

`model` is `{config.base_model}`. A model of another KV geometry is refused; this one:

{_table(["KV geometry", ""], config.geometry.to_dict().items())}

Visual tokens are coded in tiles of {config.codec.tile}{_where(config)}; what is in no full tile is stored raw.

{MEASURED_TITLE}

{measured_section(metrics or {}, name)}

## Recipe

{recipe_text}
"""


ROW_COLUMNS = {
    "agreement": "agreement",
    "kl": "KL",
    "visual_kv_bytes": "visual KV bytes",
    "kv_bytes": "KV bytes",
    "parameter_bytes": "parameter bytes",
    "compression": "compression",
    "prefill_ratio": "prefill, ratio",
    "tokens_per_s_ratio": "tokens/s, ratio",
    "n": "n",
}
"""Column titles in the model card by key of an evaluation row; they follow method, settings and accuracies."""
ROW_NOTE = (
    "Bytes are sums of storages; compression is that of the visual KV; ratios are relative to the full cache of the"
    " same run, prefill below 1 and tokens/s above 1 being faster."
)


def measured_section(metrics: Mapping[str, Any], name: str) -> str:
    """Body of the card's section "Measured": the rows of an evaluation and the metrics at the end of training."""
    evaluation, scalars = metrics.get("eval") or {}, metrics.get("train") or {}
    rows, command = evaluation.get("rows") or [], f"`kvcapsule eval --capsule {name}`"
    if rows:
        tasks = list(dict.fromkeys(task for row in rows for task in row.get("accuracy") or {}))
        keys = [key for key in ROW_COLUMNS if any(row.get(key) is not None for row in rows)]
        head = ["method", "settings", *(f"accuracy, {task}" for task in tasks), *(ROW_COLUMNS[key] for key in keys)]
        body = (
            [
                row.get("method"),
                row.get("settings"),
                *((row.get("accuracy") or {}).get(t) for t in tasks),
                *(row.get(k) for k in keys),
            ]
            for row in rows
        )
        printed_by = f"`{evaluation['command']}`" if evaluation.get("command") else command
        text = f"{_table(head, body)}\n\nPrinted by {printed_by}. {ROW_NOTE}"
    else:
        text = f"Not measured yet: run {command}."
    return f"{text}\n\nAt the end of training:\n\n{_table(['metric', 'value'], scalars.items())}" if scalars else text


def _where(config: CapsuleConfig) -> str:
    """Where tiles begin, unless it is at an image's first token."""
    align = config.codec.align
    return "" if align == 1 else f" that begin at multiples of {align} tokens of the sequence"


def _table(head: list[str], body: Iterable[Iterable[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={_cell(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "/".join(map(_cell, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())

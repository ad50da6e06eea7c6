"""Model card of a capsule: README.md with front matter for the Hub, usage, measurements and recipe."""

import re
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

from huggingface_hub import ModelCardData

from ..atomic_files import to_yaml
from .config import CapsuleConfig
from .record import ModelRecord

CARD_TAGS = ["kv-cache", "compression", "vision-language"]
LIBRARY = "kvcapsule"
CARD_LOADS = re.compile(r'Capsule\.from_pretrained\("(?P<name>[^"\n]*)"')
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
    base, record = config.base_model, ModelRecord.of(config.metadata)
    name = name or f"{base.rpartition('/')[2]}-{config.family}"
    data = ModelCardData(
        # The Hub refuses a base_model that is not an id. The text below names it anyway.
        base_model=None if record.local or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", base) else base,
        library_name=LIBRARY,
        tags=CARD_TAGS,
        license=record.license.get("license"),
        license_name=record.license.get("license_name"),
        license_link=record.license.get("license_link"),
    )
    at = f" at revision `{config.base_revision}`" if config.base_revision else ""
    revision = f', revision="{config.base_revision}"' if config.base_revision and not record.local else ""
    warned = ", and other weights are warned of" if record.weights else ""
    recipe_text = f"```yaml\n{to_yaml(recipe)}```" if recipe else "No recipe was saved with this capsule."
    return f"""---
{data.to_yaml()}
---

# {PurePath(name).name}

A capsule for `{base}`{at}: codecs of the family `{config.family}` that store the visual part of its KV cache as \
latents, which
attention reads as they are.

## Use

```python
from PIL import Image

from kvcapsule import Capsule, attach, conversation, encode, load_vlm

model, processor = load_vlm("{base}"{revision}){"  # the path of this folder" if record.local else ""}
capsule = Capsule.from_pretrained("{name}", device=model.device)
question = conversation([Image.open("image.png")], "What does the image show?")
inputs = encode(processor, [question], model.dtype).to(model.device)
with attach(model, capsule):
    output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0], skip_special_tokens=True))
```

or `kvcapsule generate --capsule {name} --image image.png --prompt "What does the image show?"`.

A model of another KV geometry is refused{warned}. This one:

{_table(["KV geometry", ""], config.geometry.to_dict().items())}

Visual tokens are coded in tiles of {config.codec.tile}{_where(config)}; what is in no full tile is stored raw.

{MEASURED_TITLE}

{measured_section(metrics or {}, name)}

## Recipe

{recipe_text}
"""


def renamed(card: str, name: str) -> str:
    """A card whose code and commands load the capsule by another name."""
    loads = CARD_LOADS.search(card)
    if loads is None:
        return card
    before = re.escape(loads["name"])
    card = CARD_LOADS.sub(lambda _: f'Capsule.from_pretrained("{name}"', card)
    return re.sub(rf"(?<=--capsule ){before}(?=[\s`])", lambda _: name, card)


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

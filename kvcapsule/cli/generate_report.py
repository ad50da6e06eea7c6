"""What `kvcapsule generate` prints to stderr after the answer: the answer with the full cache, and the bytes of the
caches. The model's libraries are imported inside functions."""

import sys
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

    from ..store.image_store import ImageStore


class Answer(NamedTuple):
    """One answer of the model."""

    tokens: list[int]
    """Ids of the new tokens, the end token included."""
    text: str
    cache: "Cache"


class Row(NamedTuple):
    """A line of the report."""

    name: str
    figure: str
    note: str = ""


def show_comparison(answer: Answer, full: Answer) -> None:
    """Print the answer with the full cache, and whether the other one is identical."""
    if answer.tokens == full.tokens:
        verdict = "identical"
    else:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer.tokens, full.tokens, strict=False)))
        verdict = f"different from token {same + 1} on"
    print(f"\nanswer with the full cache ({verdict}):\n{full.text}", file=sys.stderr)


def show_bytes(model: "PreTrainedModel", answer: Answer, full: Answer | None, visual_tokens: int) -> None:
    """Print the bytes of the answer's cache, and how many times fewer they are than those of the full cache: of the
    visual tokens, which a capsule's compression is about, and of all.

    Args:
        model: that answered.
        answer: whose cache is shown.
        full: the answer with the full cache, whose bytes are measured; None computes them from the geometry.
        visual_tokens: of the prompt.
    """
    from rich.console import Console

    from ..inference.cache import CapsuleCache
    from .tables import NAME, TEXT, Column, ReportTable, print_report

    tokens = f"{answer.cache.get_seq_length()} tokens"
    if not isinstance(answer.cache, CapsuleCache):
        rows = [Row("full cache", f"{_measured_bytes(answer.cache):,}", f"measured, {tokens}")]
    else:
        stored = answer.cache.bytes()
        if full is None:
            full_bytes, origin = answer.cache.full_bytes(), f"computed, {tokens}"
        else:
            full_bytes = _measured_bytes(full.cache)
            origin = f"measured, {full.cache.get_seq_length()} tokens"
        visual_note = f"full cache of the {visual_tokens} visual tokens / visual"
        maps = "parameters, once for all sequences; not in the total"
        rows = [
            Row("visual", f"{stored.visual:,}"),
            Row("text", f"{stored.text:,}"),
            Row("tail", f"{stored.tail:,}", "tokens written since, with room to grow"),
            *([Row("other", f"{stored.other:,}", "the model's own layers")] if stored.other else []),
            Row("total", f"{stored.total:,}", f"measured, {tokens}"),
            *([Row("codec maps", f"{stored.parameters:,}", maps)] if stored.parameters else []),
            Row("full cache", f"{full_bytes:,}", origin),
            *(
                [Row("visual compression", f"{_token_bytes(model) * visual_tokens / stored.visual:.2f}", visual_note)]
                if stored.visual
                else []
            ),
            Row("total compression", f"{full_bytes / stored.total:.2f}", "full cache / total"),
        ]
    table = ReportTable([Column("cache", NAME), Column("bytes"), Column("", TEXT)])
    for row in rows:
        table.add(*row)
    console = Console(stderr=True, highlight=False)
    console.print()
    print_report(table, console=console)


def show_store(store: "ImageStore") -> None:
    """Print how many of the images the store knew, and what it holds."""
    from .sizes import shown_bytes

    counted = store.statistics
    print(
        f"\nimage store: {counted.hits} of {counted.hits + counted.puts + counted.refused} images known,"
        f" {counted.puts} stored; {shown_bytes(store.total_bytes())} in {store.path}",
        file=sys.stderr,
    )


def _token_bytes(model: "PreTrainedModel") -> int:
    """Bytes of a token in the full cache, in the layers with full attention."""
    from ..vlm.geometry import KVGeometry, full_attention_layers

    geometry = KVGeometry.from_config(model.config)
    layer: int = 2 * geometry.kv_heads * geometry.head_dim * model.dtype.itemsize
    return len(full_attention_layers(model.config)) * layer


def _measured_bytes(cache: "Cache") -> int:
    import torch

    from ..segments.segment import storage_bytes

    return storage_bytes(
        value for layer in cache.layers for value in vars(layer).values() if isinstance(value, torch.Tensor)
    )

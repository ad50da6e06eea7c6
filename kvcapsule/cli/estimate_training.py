"""`kvcapsule estimate --train`: what `kvcapsule train` would hold and run, without starting it."""

from typing import TYPE_CHECKING, Any

from ..training_footprint import Stage, TrainingSize, held_out_of

if TYPE_CHECKING:
    from .tables import ReportTable

HARVEST_BATCHES = 40
"""Default of `kvcapsule train`: --moment_batches."""
FAMILIES = ("cross-layer", "transform")
NOTE = (
    "Beside the model and the forward of a batch; counted, not measured, and a run holds more (docs/train.md). The"
    " gradients run over the text behind the images alone. Operations are those of the decoder's matrices; a device"
    " does a third to a half of its peak. `kvcapsule train` says how long each stage takes once a batch of it has run."
)


def planned(size: TrainingSize, parameters: float, tokens: int) -> dict[str, Any]:
    """The object "train" of `--json`.

    Args:
        size: of the run.
        parameters: of the decoder that a token is multiplied with.
        tokens: of a question.
    """
    stages = size.stages()
    batches = sum(stage.batches for stage in stages)
    # The gradients' pass over the text, forward and back, is of the text alone.
    behind = size.fisher_batches * 3 + size.measure_batches
    operations = 2 * parameters * size.batch * (batches * tokens + behind * size.text)
    return {
        "family": FAMILIES[0] if size.together else FAMILIES[1],
        "tile": size.tile,
        "batch": size.batch,
        "visual_tokens": size.visual,
        "stages": [stage._asdict() for stage in stages],
        "batches": batches,
        "peak_bytes": max(stage.bytes for stage in stages),
        "operations": round(operations),
        "note": NOTE,
    }


def sized(layers: int, geometry: Any, element: int, visual: int, options: Any) -> TrainingSize:
    """The run that the options stand for.

    Args:
        layers: with full attention.
        geometry: KV geometry of the model.
        element: bytes of an element of the cache.
        visual: visual tokens of a question.
        options: `tile`, `train_batch`, `questions` and `family` of the command.
    """
    tile = options.tile or visual
    held_out = held_out_of(options.questions)
    trained = max(1, (options.questions - held_out) // options.train_batch)
    return TrainingSize(
        layers=layers,
        query_heads=geometry.query_heads,
        kv_heads=geometry.kv_heads,
        head_dim=geometry.head_dim,
        tile=tile,
        visual=visual // tile * tile,
        batch=options.train_batch,
        element=element,
        harvest_batches=min(HARVEST_BATCHES, trained),
        fisher_batches=min(12, trained),
        measure_batches=-(-held_out // options.train_batch),
        together=options.family == FAMILIES[0],
    )


def table(train: dict[str, Any]) -> "ReportTable":
    """The stages of a training run, with the batches that go through the model and the memory that each holds."""
    from .tables import NAME, Column, ReportTable

    shown = ReportTable(
        [Column("training", NAME), Column("batches through\nthe model"), Column("holds, GiB")],
        title=(
            f"{train['family']}: tiles of {train['tile']} tokens, batches of {train['batch']} questions of"
            f" {train['visual_tokens']:,} visual tokens in tiles; {train['operations'] / 1e15:,.2f} PFLOP"
        ),
    )
    for values in train["stages"]:
        stage = Stage(**values)
        shown.add(
            stage.title,
            str(stage.batches or "–"),
            f"{stage.bytes / 2**30:.2f}",
            is_strong=stage.bytes == train["peak_bytes"],
        )
    return shown

"""`kvcapsule show`: what a capsule is, what it was trained on, and what was measured of it."""

import argparse
import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import KVCapsuleError
from ..methods.shown_names import shown_name
from .errors import Parser, complain
from .results import STDOUT, add_json_option, add_wide_option, require_writable, write_json
from .sizes import shown_bytes

if TYPE_CHECKING:
    from ..capsule.overview import Overview
    from .tables import ReportTable

PROG = "kvcapsule show"


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    capsule: str
    revision: str | None
    wide: bool
    json: str | None


def main(argv: list[str] | None = None) -> int:
    """Print what is known of a capsule, or the JSON, and return the exit code."""
    options = _parser().read(argv, Options())
    try:
        _run(options)
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def _run(options: Options) -> None:
    from ..capsule.overview import overview
    from .tables import print_report

    require_writable([options.json])
    capsule = overview(options.capsule, options.revision)
    if options.json != STDOUT:
        name = shlex.quote(capsule.name)
        tables = [facts_table(capsule)]
        if capsule.rows:
            tables.append(measured_table(capsule))
        use = f'use it: kvcapsule generate --capsule {name} --image image.png --prompt "What does the image show?"'
        measure = f"measure it: kvcapsule eval --capsule {name}"
        print_report(*tables, "\n".join([use, measure]), wide=options.wide)
    write_json(options.json, _values(capsule))


def facts(capsule: "Overview") -> Iterator[tuple[str, str]]:
    """What a capsule is and was trained on, by short names."""
    from ..capsule.record import ModelRecord, data_record

    config, record, data = (
        capsule.config,
        ModelRecord.of(capsule.config.metadata),
        data_record(capsule.config.metadata),
    )
    revision = f" at {config.base_revision}" if config.base_revision else ""
    licence = f", {record.license['license']}" if record.license.get("license") else ""
    adapter = ", with an adapter" if record.adapter else ""
    g = config.geometry
    yield "family", shown_name(config.family)
    yield "model", f"{config.base_model}{revision}{f', {record.dtype}' if record.dtype else ''}{adapter}{licence}"
    some = f", full attention in {', '.join(map(str, g.full_attention))}" if g.full_attention else ""
    shape = f"{g.layers} layers{some}, {g.kv_heads} KV heads of {g.head_dim}"
    yield "KV geometry", f"{shape} ({g.model_type}, rotary {g.rotary})"
    yield "tile", f"{config.codec.tile} visual tokens"
    if capsule.compression is not None:
        yield "compression", f"{capsule.compression:.1f}x fewer bytes of visual tokens than a 16-bit cache"
    if data:
        rows = "" if capsule.training_rows is None else f", {capsule.training_rows.total:,} rows recorded"
        yield "trained on", f"{data['source']}, split {data['split']}{rows}"
    if (error := capsule.training.get("output_error")) is not None:
        yield (
            "output error",
            f"{error:.4f} of attention, on {capsule.training.get('questions', '?')} held-out questions",
        )
    yield "weights", shown_bytes(capsule.weight_bytes)


def facts_table(capsule: "Overview") -> "ReportTable":
    """What a capsule is, a fact a row."""
    from .tables import NAME, TEXT, Column, ReportTable

    table = ReportTable([Column("capsule", NAME), Column(capsule.name, TEXT)])
    for name, text in facts(capsule):
        table.add(name, text)
    table.add("folder", str(capsule.folder))
    return table


def measured_table(capsule: "Overview") -> "ReportTable":
    """The rows of the evaluation that was saved with a capsule, its own in bold."""
    from .tables import NAME, Column, ReportTable

    evaluation, rows = capsule.evaluation, capsule.rows
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("accuracy") or {}))
    data = evaluation.get("data") or {}
    table = ReportTable(
        [
            Column("method", NAME),
            Column("compression\nvs 16 bit"),
            Column("same\nanswers"),
            Column("KL in\nnats"),
            Column("accuracy"),
            Column("prefill time\nvs full", wide=True),
            Column("tokens/s\nvs full", wide=True),
            *(Column(task, wide=True) for task in tasks),
        ],
        title=f"measured on {data.get('source')}, split {data.get('split')}, {rows[0].get('n')} questions",
        note="Same answers: the share that equals the full cache's. Accuracy: the mean over tasks (--wide shows each).",
    )
    for row in rows:
        accuracy = row.get("accuracy") or {}
        scores = (number(accuracy.get(task), ".3f") for task in tasks)
        table.add(*figures(row), *scores, is_strong=capsule.is_of_this(row))
    return table


def figures(row: Mapping[str, Any]) -> list[str]:
    """Of a row of an evaluation: its name, compression against 16 bits, same answers, KL, mean accuracy, and the times
    of prefill and token against the full cache; a dash for what was not measured."""
    scores = [score for score in (row.get("accuracy") or {}).values() if score is not None]
    return [
        shown_name(str(row.get("method"))),
        number(row.get("compression16"), ".1f", "x"),
        number(row.get("agreement"), ".3f"),
        number(row.get("kl"), ".2g"),
        number(sum(scores) / len(scores) if scores else None, ".3f"),
        number(row.get("prefill_ratio"), ".2f"),
        number(row.get("tokens_per_s_ratio"), ".2f"),
    ]


def number(value: Any, form: str, unit: str = "") -> str:
    """A value as tables show it; a dash for one that is no number."""
    return f"{value:{form}}{unit}" if isinstance(value, int | float) else "–"


def _values(capsule: "Overview") -> dict[str, Any]:
    return {
        "name": capsule.name,
        "config": capsule.config.to_dict(),
        "compression": capsule.compression,
        "weight_bytes": capsule.weight_bytes,
        "training_rows": None if capsule.training_rows is None else capsule.training_rows.total,
        "recipe": capsule.recipe,
        "metrics": capsule.metrics,
    }


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="Show what a capsule is, what it was trained on, and what was measured.")
    parser.add_argument("capsule", metavar="CAPSULE", help="a folder, a shipped capsule or an id on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    add_json_option(parser)
    add_wide_option(parser)
    return parser

"""`kvcapsule estimate`: bytes of the cache, and an upper bound of the decode speed-up with capsules, from a model's
config alone.

The closed form is `kvcapsule.estimate`, the counts are those of `kvcapsule.model_counts`, which is imported inside
functions: `--help` and a mistyped option do not wait for the model's libraries.
"""

import argparse
import math
import re
from typing import Any

from .. import estimate as closed_form
from ..errors import InputError, KVCapsuleError
from . import estimate_training as training
from .counts import count, count_or_0
from .errors import Parser, complain
from .results import STDOUT, add_json_option, require_writable, write_json

PROG = "kvcapsule estimate"
BATCHES = (1, 4, 16, 64)
"""Batch sizes that are shown in addition to --batch."""
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_GIB = 2**30
_MOST = 10**6
"""Largest compression, and largest memory in GiB."""
_MOST_PIXELS = 2**25
"""Of an image for the model's processor."""
_MOST_IMAGES = 100
"""For the model's processor."""
_RENAMED = {"--ratio": "--ratio is --compression now: --compression 20 stores twenty times fewer bytes."}
CAVEAT = (
    "An upper bound from bytes alone; nothing is measured. Left out: what a capsule computes and the maps it reads,"
    " activations, the time of a launch, layers without full attention, and experts beyond those of one token. At batch"
    " 1 the bound is near 1 wherever the weights outweigh one sequence's cache: a step reads them whatever is stored."
)


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    model: str
    revision: str | None
    images: int
    visual_tokens: int | None
    resolution: tuple[int, int]
    """Height and width; None where visual_tokens is set."""
    text: int
    batch: int
    compression: float
    dtype: str
    weight_bits: int | None
    memory: float | None
    train: bool
    tile: int
    train_batch: int
    questions: int
    family: str
    json: str | None


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or the JSON, and return the exit code."""
    options = _parser().read(argv, Options(), _RENAMED)
    try:
        require_writable([options.json])
        result = estimated(options)
        if options.json != STDOUT:
            _print_tables(result)
        write_json(options.json, result)
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def estimated(options: Options) -> dict[str, Any]:
    """The object of `--json`.

    Raises:
        InputError, GeometryError, ModelError: if the model is not found or has no cache that capsules cover, or if its
            processor cannot take images of this size.
    """
    from ..model_counts import count_weights, read_config
    from ..vlm.geometry import KVGeometry, full_attention_layers

    config = read_config(options.model, options.revision)
    geometry = KVGeometry.from_config(config)
    weights = count_weights(config, options.model)
    visual = _visual_tokens(config, options)
    element, layers = ELEMENT_BYTES[options.dtype], len(full_attention_layers(config))
    token = 2 * layers * geometry.kv_heads * geometry.head_dim * element
    full = closed_form.full_cache(token, visual, options.text)
    capsule = closed_form.capsule_cache(full, element, options.compression)
    read, stored = (count(element, options.weight_bits) for count in (weights.read_bytes, weights.held_bytes))
    memory = options.memory and {
        "bytes": round(options.memory * _GIB),
        "batch_full": closed_form.largest_batch(options.memory * _GIB, stored, full),
        "batch_capsule": closed_form.largest_batch(options.memory * _GIB, stored, capsule),
    }
    size = training.sized(layers, geometry, element, visual, options)
    if options.train and not size.visual:
        raise InputError(f"--tile {options.tile}: {visual} visual tokens fill no tile. Give a smaller one.")
    matrices = weights.read_matrices + weights.read_others
    train = training.planned(size, matrices, visual + options.text) if options.train else None
    return {
        "model": options.model,
        "model_type": geometry.model_type,
        "dtype": options.dtype,
        "weight_bits": options.weight_bits or 8 * element,
        "images": options.images,
        "visual_tokens": visual,
        "text_tokens": options.text,
        "batch": options.batch,
        "compression16": options.compression,
        "compression": full.visual / capsule.visual,
        "layers": geometry.layers,
        "full_attention_layers": layers,
        "kv_bytes_per_token": token,
        "full": {name: round(getattr(full, name)) for name in ("visual", "text", "total")},
        "capsule": {name: round(getattr(capsule, name)) for name in ("visual", "text", "total")},
        "weight_bytes_read": round(read),
        "weight_bytes_held": round(stored),
        "speedup_bound": [
            {"batch": batch, "bound": closed_form.speedup_bound(read, full, capsule, batch)}
            for batch in sorted({*BATCHES, options.batch})
        ],
        "speedup_limit": closed_form.speedup_limit(full, capsule),
        "memory": memory,
        "train": train,
        "measured": False,
        "note": CAVEAT,
    }


def _visual_tokens(config: Any, options: Options) -> int:
    """Visual tokens of a sequence: given, or those that the model makes of images of the given size."""
    from ..model_counts import count_visual_tokens

    if options.visual_tokens is not None:
        return options.images * options.visual_tokens
    if options.images > _MOST_IMAGES:
        raise InputError(
            f"--resolution with --images above {_MOST_IMAGES:,}: give --visual-tokens of an image instead."
        )
    return count_visual_tokens(config, options.model, options.revision, options.images, options.resolution)


def _print_tables(result: dict[str, Any]) -> None:
    from .tables import NAME, Column, ReportTable, print_report

    if result["train"]:
        print_report(training.table(result["train"]), f"weights: {result['weight_bytes_held']:,} bytes", training.NOTE)
        return
    counted = f"{result['full_attention_layers']} of {result['layers']} layers have full attention"
    sequence = ReportTable(
        [Column("a sequence's cache", NAME), Column("visual"), Column("text"), Column("total")],
        note=(
            f"bytes; {result['visual_tokens']:,} visual tokens (images: {result['images']}),"
            f" {result['text_tokens']:,} of text; {counted}; full: {result['dtype']}; with capsules visual tokens take"
            f" {result['compression16']:g}x less than at 16 bits, {result['compression']:g}x less than in"
            f" {result['dtype']}"
        ),
    )
    for key, name in (("full", "full"), ("capsule", "capsules")):
        sequence.add(name, *(f"{result[key][part]:,}" for part in ("visual", "text", "total")))
    bounds = ReportTable(
        [Column("batch"), Column("tokens/s, at most")], note="with capsules, over the full cache at the same batch"
    )
    for row in result["speedup_bound"]:
        bounds.add(f"{row['batch']}", f"{row['bound']:.3f}x", is_strong=row["batch"] == result["batch"])
    bounds.add("any", f"{result['speedup_limit']:.3f}x")
    weights = (
        f"weights: {result['weight_bytes_read']:,} bytes read a step, {result['weight_bytes_held']:,} held"
        f" ({result['weight_bits']} bits)"
    )
    fitting = []
    if result["memory"]:
        memory = result["memory"]
        fitting = [
            f"largest batch in {memory['bytes'] / _GIB:g} GiB, weights and caches alone: "
            f"{memory['batch_full']:,} with the full cache, {memory['batch_capsule']:,} with capsules"
        ]
    print_report(sequence, weights, bounds, *fitting, CAVEAT)


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Predict the bytes of the cache, and an upper bound of the decode speed-up with capsules, from a model's config"
        " alone.",
    )
    add = parser.add_argument
    add(
        "--model",
        metavar="ID",
        default="pages-vlm",
        help="a shipped model, a folder or an id on the Hub (default: %(default)s)",
    )
    add("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    prompts = parser.add_argument_group("the prompts")
    add = prompts.add_argument
    add("--images", metavar="N", type=count, default=1, help="images of a sequence (default: %(default)s)")
    size = prompts.add_mutually_exclusive_group(required=True)
    size.add_argument("--visual-tokens", metavar="N", type=count, help="visual tokens of an image")
    size.add_argument(
        "--resolution",
        metavar="HxW",
        type=_resolution,
        help="pixels of an image; the model's processor then gives its visual tokens",
    )
    add("--text", metavar="N", type=count_or_0, default=128, help="text tokens of a sequence (default: %(default)s)")
    add("--batch", metavar="N", type=count, default=1, help="sequences with their own images (default: %(default)s)")
    add = parser.add_argument_group("storage").add_argument
    add(
        "--compression",
        metavar="C",
        type=_compression,
        default=20.0,
        help="how many times fewer bytes visual tokens take than at 16 bits, for any --dtype (default: %(default)g)",
    )
    add(
        "--dtype",
        choices=ELEMENT_BYTES,
        default="bfloat16",
        help="precision of the full cache, the text and the weights (default: %(default)s)",
    )
    add(
        "--weight-bits",
        type=int,
        choices=closed_form.SCALE_BITS,
        help="bits of the decoder layers' matrices; at 4, scales and minima add 0.25 (default: those of --dtype)",
    )
    add("--memory", metavar="GIB", type=_gib, help="also show the largest batch that fits beside the weights")
    add = parser.add_argument_group("training").add_argument
    add(
        "--train",
        action="store_true",
        help="show instead what `kvcapsule train` would hold beside the model and run, stage by stage",
    )
    add("--family", choices=training.FAMILIES, default=training.FAMILIES[0], help="codec family (default: %(default)s)")
    add("--tile", metavar="N", type=count_or_0, default=64, help="tokens of a tile; 0: all (default: %(default)s)")
    add("--train-batch", metavar="N", type=count, default=16, help="questions of a batch (default: %(default)s)")
    add("--questions", metavar="N", type=count, default=2048, help="of the data (default: %(default)s)")
    add_json_option(parser)
    return parser


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _compression(text: str) -> float:
    if not 1 <= _number(text) <= _MOST:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of at least 1 (and at most {_MOST:,}): 20 stores twenty times fewer bytes than"
            " 16 bits an element"
        )
    return float(text)


def _gib(text: str) -> float:
    if not 0 < _number(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 (and at most {_MOST:,})")
    return float(text)


def _resolution(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 448x672")
    height, width = (int(side) if len(side) < 9 else _MOST_PIXELS + 1 for side in match.groups())
    if height * width > _MOST_PIXELS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {_MOST_PIXELS:,} pixels")
    return height, width

"""`kvcapsule estimate`: bytes of the cache and the most that capsules can speed decoding up, before anything is
trained.

Read from the model's config alone: its parameters are counted on a model without storage. The closed form is
`kvcapsule.estimate`. The model's libraries are imported inside functions: `--help` and a mistyped option do not wait
for them.
"""

import argparse
import json
import math
import re
from typing import TYPE_CHECKING, Any

from .. import estimate as form
from ..errors import InputError
from .errors import Parser, complain

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PROG = "kvcapsule estimate"
BATCHES = (1, 4, 16, 64)
"""Shown beside the batch that is asked for."""
ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_GIB = 2**30
_WIDE = 140
"""Columns of a table that is not printed to a terminal."""
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k")
"""What text configs call it."""
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
    """Height and width; None where visual_tokens is given."""
    text: int
    batch: int
    ratio: float
    dtype: str
    weight_bits: int | None
    memory: float | None
    json: bool


def main(argv: list[str] | None = None) -> int:
    """Print the tables, or the JSON, and return the exit code."""
    options = _parser().parse_args(argv, namespace=Options())
    from ..errors import GeometryError, ModelError

    try:
        found = estimated(options)
    except (InputError, GeometryError, ModelError) as error:
        return complain(PROG, error)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print_tables(found)
    return 0


def estimated(options: Options) -> dict[str, Any]:
    """The object of `--json`.

    Raises:
        InputError, GeometryError, ModelError: if the model is not found or has no cache that capsules cover, or its
        processor cannot take
            images of this size.
    """
    from ..vlm.geometry import KVGeometry, full_attention_layers

    config = _read_config(options)
    geometry = KVGeometry.from_config(config)
    weights = _count_weights(config, options.model)
    visual = options.images * options.visual_tokens if options.visual_tokens else _visual_tokens(config, options)
    element, layers = ELEMENT_BYTES[options.dtype], len(full_attention_layers(config))
    token = 2 * layers * geometry.kv_heads * geometry.head_dim * element
    full = form.full_cache(token, visual, options.text)
    capsule = form.capsule_cache(full, element, options.ratio)
    read, held = (count(element, options.weight_bits) for count in (weights.read_bytes, weights.held_bytes))
    memory = options.memory and {
        "bytes": round(options.memory * _GIB),
        "batch_full": form.largest_batch(options.memory * _GIB, held, full),
        "batch_capsule": form.largest_batch(options.memory * _GIB, held, capsule),
    }
    return {
        "model": options.model,
        "model_type": geometry.model_type,
        "dtype": options.dtype,
        "weight_bits": options.weight_bits or 8 * element,
        "images": options.images,
        "visual_tokens": visual,
        "text_tokens": options.text,
        "batch": options.batch,
        "ratio": options.ratio,
        "ratio_to_full": full.visual / capsule.visual,
        "layers": geometry.layers,
        "full_attention_layers": layers,
        "kv_bytes_per_token": token,
        "full": {name: round(getattr(full, name)) for name in ("visual", "text", "total")},
        "capsule": {name: round(getattr(capsule, name)) for name in ("visual", "text", "total")},
        "weight_bytes_read": round(read),
        "weight_bytes_held": round(held),
        "speedup_bound": [
            {"batch": batch, "bound": form.speedup_bound(read, full, capsule, batch)}
            for batch in sorted({*BATCHES, options.batch})
        ],
        "speedup_limit": form.speedup_limit(full, capsule),
        "memory": memory,
        "measured": False,
        "note": CAVEAT,
    }


def _read_config(options: Options) -> "PreTrainedConfig":
    from transformers import AutoConfig

    from kvcapsule.checkpoints import shipped

    from ..errors import ModelError

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(shipped(options.model) or options.model), revision=options.revision
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read a config of {options.model!r}: {error}") from error
    return config


def _count_weights(config: "PreTrainedConfig", name: str) -> form.Weights:
    """Parameters by how they are stored and read, from a model on the meta device.

    Raises:
        ModelError: if it is no image-text-to-text model of transformers, or its config does not say how many experts a
        token is given.
    """
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText

    from ..errors import ModelError

    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ModelError(
            f"{name!r} is a {config.model_type}, which is no image-text-to-text model of transformers: use a VLM."
        )
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    # A step looks rows of an embedding up. One that is tied to the head is read whole, as the head.
    looked_up = {
        id(p) for module in decoder.modules() if isinstance(module, torch.nn.Embedding) for p in module.parameters()
    }
    others: float = sum(p.numel() for p in head.parameters()) if head is not None else 0
    matrices, quantised = 0.0, 0
    for path, parameter in decoder.named_parameters():
        if id(parameter) in looked_up:
            continue
        share = _share_of_experts(config, name) if "experts" in path.split(".") else 1
        if parameter.dim() > 1:
            matrices += share * parameter.numel()
            quantised += parameter.numel()
        else:
            others += share * parameter.numel()
    return form.Weights(matrices, others, quantised, sum(p.numel() for p in model.parameters()) - quantised)


def _share_of_experts(config: "PreTrainedConfig", name: str) -> float:
    """The least of the routed experts that a step reads: those of one token. More of them make the bound smaller, so it
    stays one."""
    from ..errors import ModelError

    text = config.get_text_config(decoder=True)
    chosen = next((getattr(text, key) for key in _EXPERTS_OF_A_TOKEN if getattr(text, key, None)), None)
    experts = next(
        (
            getattr(text, key)
            for key in ("num_experts", "n_routed_experts", "num_local_experts")
            if getattr(text, key, None)
        ),
        None,
    )
    if not chosen or not experts:
        raise ModelError(
            f"{name!r} has experts, but its config does not say how many a token is given, so what a step reads is not"
            " known."
        )
    return float(chosen / experts)


def _visual_tokens(config: "PreTrainedConfig", options: Options) -> int:
    """Visual tokens of a sequence, as the model's processor places them for images of the size that is asked for."""
    from PIL import Image
    from transformers import AutoProcessor, ProcessorMixin

    from kvcapsule.checkpoints import shipped

    from ..data.prompts import conversation, encode
    from ..errors import ModelError
    from ..vlm.spans import find_spans

    height, width = options.resolution
    try:
        processor = AutoProcessor.from_pretrained(
            str(shipped(options.model) or options.model), revision=options.revision
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the processor of {options.model!r}: {error} Give --visual-tokens instead."
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(
            f"{options.model!r} has no image processor beside its tokenizer: give --visual-tokens instead."
        )
    # All images at once: some processors cut a single one into more tiles than each of several.
    images = [Image.new("RGB", (width, height))] * options.images
    try:
        ids = encode(processor, [conversation(images, "?")])["input_ids"]
    except ValueError as error:
        raise InputError(
            f"--resolution {height}x{width}: {options.model!r} cannot take it: {error} Give --visual-tokens instead."
        ) from error
    tokens = sum(span.length for span in find_spans(config, ids))
    if not tokens:
        raise InputError(
            f"the processor of {options.model!r} places no visual tokens that its config names: give --visual-tokens"
            " instead."
        )
    return tokens


def _print_tables(found: dict[str, Any]) -> None:
    from rich.table import Table

    from .tables import print_table

    sequence = Table(
        "a sequence's cache", "visual", "text", "total", "", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    relation = (
        f"visual tokens {found['ratio']:g}x less than at 16 bits, {found['ratio_to_full']:g}x less than in"
        f" {found['dtype']}"
    )
    for key, name, note in (("full", "full", found["dtype"]), ("capsule", "capsules", relation)):
        sequence.add_row(name, *(f"{found[key][part]:,}" for part in ("visual", "text", "total")), note)
    bounds = Table("batch", "tokens/s, at most", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for row in found["speedup_bound"]:
        bounds.add_row(
            f"{row['batch']}", f"{row['bound']:.3f}x", style="bold" if row["batch"] == found["batch"] else ""
        )
    bounds.add_row("any", f"{found['speedup_limit']:.3f}x")
    for column in (*sequence.columns[1:4], *bounds.columns):
        column.justify = "right"
    counted = f"{found['full_attention_layers']} of {found['layers']} layers have full attention"
    print_table(
        sequence,
        _WIDE,
        f"bytes; {found['visual_tokens']:,} visual tokens (images: {found['images']}), {found['text_tokens']:,} of"
        f" text; {counted}\n\nweights: {found['weight_bytes_read']:,} bytes read a step, {found['weight_bytes_held']:,}"
        f" held ({found['weight_bits']} bits)\n",
    )
    below = "with capsules, over the full cache at the same batch\n\n"
    if found["memory"]:
        memory = found["memory"]
        below += (
            f"largest batch in {memory['bytes'] / _GIB:g} GiB, weights and caches alone: "
            f"{memory['batch_full']:,} with the full cache, {memory['batch_capsule']:,} with capsules\n\n"
        )
    print_table(bounds, _WIDE, below + CAVEAT)


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Predict the bytes of the cache, and the most that capsules can speed decoding up, from a model's config"
        " alone.",
    )
    parser.add_argument(
        "--model", metavar="ID", default="pages-vlm", help="a shipped model, a folder or an id on the Hub (%(default)s)"
    )
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    asked = parser.add_argument_group("what is asked of it")
    asked.add_argument(
        "--images", metavar="N", type=_count, default=1, help="images of a sequence (default: %(default)s)"
    )
    size = asked.add_mutually_exclusive_group(required=True)
    size.add_argument("--visual-tokens", metavar="N", type=_count, help="visual tokens of an image")
    size.add_argument(
        "--resolution",
        metavar="HxW",
        type=_resolution,
        help="pixels of an image: its tokens are what the processor places",
    )
    asked.add_argument(
        "--text", metavar="N", type=_whole, default=128, help="tokens of text of a sequence (default: %(default)s)"
    )
    asked.add_argument(
        "--batch",
        metavar="N",
        type=_count,
        default=1,
        help="sequences, each with its own images (default: %(default)s)",
    )
    stored = parser.add_argument_group("how it is stored")
    stored.add_argument(
        "--ratio",
        metavar="C",
        type=_ratio,
        default=20.0,
        help=(
            "how many times less visual tokens take than at 16 bits an element, whatever --dtype is (default:"
            " %(default)g)"
        ),
    )
    stored.add_argument(
        "--dtype",
        choices=ELEMENT_BYTES,
        default="bfloat16",
        help="of the full cache, the text and the weights (default: %(default)s)",
    )
    stored.add_argument(
        "--weight-bits",
        type=int,
        choices=form.SCALE_BITS,
        help="of the matrices of the decoder layers; at 4, scales and zeros add 0.25 (default: those of --dtype)",
    )
    stored.add_argument(
        "--memory", metavar="GIB", type=_gib, help="also say the largest batch that fits, weights included"
    )
    parser.add_argument("--json", action="store_true", help="print an object instead of the tables")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ratio(text: str) -> float:
    if not 1 <= _number(text) < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number of at least 1: 20 stores twenty times less than 16 bits an element"
        )
    return float(text)


def _gib(text: str) -> float:
    if not 0 < _number(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def _resolution(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, such as 448x672")
    return int(found[1]), int(found[2])

"""`kvcapsule generate`: the answer to a prompt about images, and the bytes that its cache held.

The model's libraries are imported inside functions: `--help` and a mistyped option do not wait for them.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any, cast

from ..errors import InputError, KVCapsuleError
from .counts import count
from .errors import Parser, complain
from .generate_report import Answer, show_bytes, show_comparison, show_store
from .model_check import checked_models
from .sizes import byte_count, shown_bytes

if TYPE_CHECKING:
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

    from ..capsule.capsule import Capsule
    from ..store.image_store import ImageStore

PROG = "kvcapsule generate"
DEFAULT_MODEL = "pages-vlm"
_STORE_BYTES = 2 * 10**9
"""Room of a store for which none is named."""


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    model: str | None
    capsule: str | None
    strict: bool
    store: str | None
    store_max_bytes: int | None
    image: list[str]
    prompt: str
    max_new_tokens: int
    do_sample: bool
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int
    dtype: str
    device: str | None
    compare: bool


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: those of the process) and return its exit code."""
    options = _parser().read(argv, Options())
    try:
        run(options)
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def run(options: Options) -> None:
    """Answer on stdout, report on stderr.

    Raises:
        InputError, CapsuleError, DataError, GeometryError, ModelError: for input that cannot be used. What is quick to
            check comes before the model is loaded.
    """
    from rich.console import Console
    from transformers.utils import logging

    from ..capsule.capsule import Capsule
    from ..capsule.trained_with import trained_with
    from ..data.images import open_image
    from ..data.prompts import conversation, encode
    from ..store.image_store import ImageStore
    from ..vlm.geometry import KVGeometry
    from ..vlm.loading import load_vlm
    from ..vlm.spans import find_spans

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    _require_consistent(options)
    images = [open_image(path) for path in options.image]
    room = _STORE_BYTES if options.store_max_bytes is None else options.store_max_bytes
    store = ImageStore(options.store, max_bytes=room) if options.store else None
    capsule = Capsule.from_pretrained(options.capsule) if options.capsule else None
    name, revision = options.model or DEFAULT_MODEL, None
    if options.capsule and not options.model:
        known = trained_with(options.capsule)
        name, revision = known.model(), known.revision
    model, processor = load_vlm(name, revision, dtype=options.dtype, device=options.device)
    # Refused without a capsule too: the cache of an encoder-decoder is of another kind, and is not measured.
    geometry = KVGeometry.from_config(model.config)
    if capsule is not None:
        capsule.require_geometry(geometry)
        capsule.to(model.device)
    try:
        inputs = encode(processor, [conversation(images, options.prompt)], model.dtype).to(model.device)
    except ValueError as error:
        raise InputError(f"{name!r} cannot take this prompt: {error}") from error
    spans = find_spans(model.config, inputs["input_ids"], inputs)
    named = [] if capsule is None else [(str(options.capsule), capsule)]
    with checked_models(named, model, options.strict, Console(stderr=True)):
        answer = _answer(model, processor, inputs, options, capsule, stream=True, store=store)
    full = answer if capsule is None else None
    if options.compare:
        full = _answer(model, processor, inputs, options, None, stream=False)
        show_comparison(answer, full)
    show_bytes(model, answer, full, sum(span.length for span in spans))
    if store is not None:
        show_store(store)


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Answer a prompt about images with a capsule's compressed cache, or with the full cache. "
        "The answer goes to stdout as it is written, the bytes of the cache to stderr.",
    )
    add = parser.add_argument_group("the prompt").add_argument
    add("--image", metavar="FILE", action="append", default=[], help="an image; may be repeated, or left out")
    add("--prompt", metavar="TEXT", required=True, help="the question; the images come before it")
    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        metavar="ID",
        help="a shipped model, a folder or an id on the Hub (default: the model that the capsule was trained with;"
        f" without a capsule {DEFAULT_MODEL})",
    )
    add("--capsule", metavar="ID", help="a shipped capsule, a folder or an id on the Hub (default: the full cache)")
    add(
        "--strict",
        metavar="BOOL",
        nargs="?",
        type=_truth,
        default=False,
        const=True,
        help="refuse a capsule of another model, which otherwise a line warns of",
    )
    add(
        "--store",
        metavar="PATH",
        help="a folder that keeps the capsules of images (`kvcapsule store`): an image seen before behind the same"
        " prefix is not read again",
    )
    add(
        "--store-max-bytes",
        metavar="SIZE",
        type=byte_count,
        help=f"with --store: the most that the folder may hold, such as 500MB (default: {shown_bytes(_STORE_BYTES)})",
    )
    add(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="precision: auto (as saved), float32, float16 or bfloat16 (default: %(default)s)",
    )
    add(
        "--device",
        metavar="NAME",
        help="such as cpu or cuda:1; auto spreads the model over devices (default: CUDA if present)",
    )
    add = parser.add_argument_group("the answer").add_argument
    add("--max-new-tokens", metavar="N", type=count, default=128, help="most tokens to write (default: %(default)s)")
    add("--do-sample", action="store_true", help="draw tokens at random by their probability (default: the likeliest)")
    add("--temperature", metavar="X", type=float, help="with --do-sample: above 1 is more varied, below 1 less")
    add("--top-p", metavar="P", type=float, help="with --do-sample: draw from the likeliest tokens of this total share")
    add("--top-k", metavar="N", type=count, help="with --do-sample: draw from this many of the likeliest tokens")
    add("--seed", metavar="N", type=int, default=0, help="with --do-sample: random seed (default: %(default)s)")
    add = parser.add_argument_group("report").add_argument
    add(
        "--compare",
        action="store_true",
        help="also answer with the full cache: show that answer, whether it is identical, and its measured bytes",
    )
    return parser


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def _require_consistent(options: Options) -> None:
    """Refuse options that would have no effect or cannot work, before the model is loaded."""
    from ..vlm.loading import require_device

    if options.compare and options.capsule is None:
        raise InputError("--compare sets a capsule against the full cache: give a --capsule too.")
    if options.strict and options.capsule is None:
        raise InputError("--strict compares the model with a capsule's: give a --capsule too.")
    if options.store is not None and options.capsule is None:
        raise InputError("--store keeps what a capsule makes of images: give a --capsule too.")
    if options.store_max_bytes is not None and options.store is None:
        raise InputError("--store-max-bytes has an effect only with --store.")
    sampling = [name for name in ("temperature", "top_p", "top_k") if getattr(options, name) is not None]
    if sampling and not options.do_sample:
        raise InputError(f"--{sampling[0].replace('_', '-')} has an effect only with --do-sample.")
    if options.temperature is not None and not options.temperature > 0:
        raise InputError(
            f"--temperature {options.temperature}: it must be above 0; leave --do-sample out to take the likeliest"
            " tokens."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InputError(f"--top-p {options.top_p} is outside (0, 1].")
    require_device(options.device)


def _answer(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    inputs: "BatchFeature",
    options: Options,
    capsule: "Capsule | None",
    stream: bool,
    store: "ImageStore | None" = None,
) -> Answer:
    """Generate with a capsule's cache, or without a capsule with the model's default cache.

    Raises:
        GeometryError: if the capsule does not fit the model.
    """
    import torch
    from transformers import TextStreamer

    from ..inference.attach import attach
    from ..inference.cache import CapsuleCache
    from ..inference.transformers_api import cache_argument, output_cache

    tokenizer = processor.tokenizer
    # transformers declares `generate` on a mixin that PreTrainedModel's type does not name.
    untyped = cast("Any", model)
    # Both answers of a comparison draw the same random numbers.
    torch.manual_seed(options.seed)
    arguments: dict[str, Any] = {
        **inputs,
        "max_new_tokens": options.max_new_tokens,
        "do_sample": options.do_sample,
        "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
        "return_dict_in_generate": True,
        **_sampling(options),
    }
    if capsule is None:
        output = untyped.generate(**arguments)
    else:
        # A store puts the cache together itself.
        cache = {} if store is not None else cache_argument(CapsuleCache(model.config, capsule))
        with attach(model, capsule, store):
            output = untyped.generate(**arguments, **cache)
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(tokens, tokenizer.decode(tokens, skip_special_tokens=True), output_cache(output))


def _sampling(options: Options) -> dict[str, float | int | None]:
    """Options of generate for sampling; those that are not set keep the model's defaults."""
    named = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    if not options.do_sample:
        # A model whose saved defaults are for sampling would warn that they have no effect.
        return named
    return {name: value for name, value in named.items() if value is not None}

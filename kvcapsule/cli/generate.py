"""`kvcapsule generate`: the answer to a prompt about images, and the bytes that its cache held.

The model's libraries are imported inside functions: `--help` and a mistyped option do not wait for them.
"""

import argparse
import sys
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ..errors import InputError
from .errors import Parser, complain

if TYPE_CHECKING:
    from transformers import BatchFeature, Cache, PreTrainedModel, ProcessorMixin

    from ..capsule.capsule import Capsule
    from ..inference.cache import CapsuleCache

PROG = "kvcapsule generate"


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    model: str
    capsule: str | None
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


class Answer(NamedTuple):
    """What one run of the model gave."""

    tokens: list[int]
    """Ids of the new tokens, the end token included."""
    text: str
    cache: "Cache"


class Row(NamedTuple):
    """A line of the report."""

    name: str
    figure: str
    note: str = ""


def main(argv: list[str] | None = None) -> int:
    """Run the command with the arguments `argv` (None: those of the process) and return its exit code."""
    options = _parser().parse_args(argv, namespace=Options())
    from ..errors import CapsuleError, DataError, GeometryError, ModelError

    try:
        run(options)
    except (InputError, CapsuleError, DataError, GeometryError, ModelError) as error:
        return complain(PROG, error)
    return 0


def run(options: Options) -> None:
    """Answer on stdout, report on stderr.

    Raises:
        InputError, CapsuleError, DataError, GeometryError, ModelError: for input that cannot be used. What is quick to
        check comes before
            the model is loaded.
    """
    from transformers.utils import logging

    from ..capsule.capsule import Capsule
    from ..data.prompts import conversation, encode
    from ..data.source import open_image
    from ..vlm.geometry import KVGeometry
    from ..vlm.loading import load_vlm

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    _require_consistent(options)
    images = [open_image(path) for path in options.image]
    capsule = Capsule.from_pretrained(options.capsule) if options.capsule else None
    model, processor = load_vlm(options.model, dtype=options.dtype, device=options.device)
    # Refused without a capsule too: an encoder-decoder's cache is of another kind, and could not be measured as this
    # one is.
    KVGeometry.from_config(model.config)
    if capsule is not None:
        capsule.to(model.device)
    try:
        inputs = encode(processor, [conversation(images, options.prompt)], model.dtype).to(model.device)
    except ValueError as error:
        raise InputError(f"{options.model!r} cannot take this prompt: {error}") from error
    answer = _answer(model, processor, inputs, options, capsule, stream=True)
    full = answer if capsule is None else None
    if options.compare:
        full = _answer(model, processor, inputs, options, None, stream=False)
        _show_comparison(answer, full)
    _show_bytes(model, answer, full)


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Answer a prompt about images with a capsule's compressed cache, or with the full cache. "
        "The answer goes to stdout as it is written, the bytes of the cache to stderr.",
    )
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--image", metavar="FILE", action="append", default=[], help="an image; may be repeated, and left out"
    )
    what.add_argument("--prompt", metavar="TEXT", required=True, help="the question; the images stand before it")
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="ID",
        default="pages-vlm",
        help="a shipped model, a folder or an id on the Hub (default: %(default)s)",
    )
    model.add_argument(
        "--capsule",
        metavar="ID",
        help="a shipped capsule, a folder or an id on the Hub (default: none, which is the full cache)",
    )
    model.add_argument(
        "--dtype",
        metavar="NAME",
        default="auto",
        help="auto (as saved), float32, float16 or bfloat16 (default: %(default)s)",
    )
    model.add_argument(
        "--device",
        metavar="NAME",
        help="such as cpu or cuda:1; auto spreads the model over devices (default: cuda if present)",
    )
    writing = parser.add_argument_group("how it is answered")
    writing.add_argument(
        "--max-new-tokens", metavar="N", type=_count, default=128, help="most tokens to write (default: %(default)s)"
    )
    writing.add_argument(
        "--do-sample", action="store_true", help="draw each token by its probability (default: take the likeliest)"
    )
    writing.add_argument(
        "--temperature", metavar="X", type=float, help="with --do-sample: above 1 is more varied, below 1 less"
    )
    writing.add_argument(
        "--top-p",
        metavar="P",
        type=float,
        help="with --do-sample: draw from the likeliest tokens that make up this share",
    )
    writing.add_argument(
        "--top-k", metavar="N", type=_count, help="with --do-sample: draw from this many of the likeliest tokens"
    )
    writing.add_argument(
        "--seed", metavar="N", type=int, default=0, help="with --do-sample: which draw (default: %(default)s)"
    )
    report = parser.add_argument_group("report")
    report.add_argument(
        "--compare",
        action="store_true",
        help=(
            "also answer with the full cache: show that answer, whether it is identical, and its measured bytes in"
            " place of computed ones"
        ),
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _require_consistent(options: Options) -> None:
    """Refuse what would have no effect or cannot work, before anything is loaded."""
    import torch

    if options.compare and options.capsule is None:
        raise InputError("--compare sets a capsule against the full cache: give a --capsule too.")
    given = [name for name in ("temperature", "top_p", "top_k") if getattr(options, name) is not None]
    if given and not options.do_sample:
        raise InputError(f"--{given[0].replace('_', '-')} has an effect only with --do-sample.")
    if options.temperature is not None and not options.temperature > 0:
        raise InputError(
            f"--temperature {options.temperature}: it must be above 0; leave --do-sample out to take the likeliest"
            " tokens."
        )
    if options.top_p is not None and not 0 < options.top_p <= 1:
        raise InputError(f"--top-p {options.top_p} is outside (0, 1].")
    if options.device not in (None, "auto"):
        try:
            torch.empty(0, device=options.device)
        # A build of torch without CUDA answers with an AssertionError.
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {options.device} cannot be used here: {str(error).splitlines()[0]}") from error


def _answer(
    model: "PreTrainedModel",
    processor: "ProcessorMixin",
    inputs: "BatchFeature",
    options: Options,
    capsule: "Capsule | None",
    stream: bool,
) -> Answer:
    """Generate with a capsule's cache, or without one with the cache that the model takes by itself.

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
    generate = cast("Any", model).generate
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
        output = generate(**arguments)
    else:
        with attach(model, capsule):
            output = generate(**arguments, **cache_argument(CapsuleCache(model.config, capsule)))
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return Answer(tokens, tokenizer.decode(tokens, skip_special_tokens=True), output_cache(output))


def _sampling(options: Options) -> dict[str, float | int | None]:
    """How tokens are drawn; what is not given keeps the model's own default."""
    named = {"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k}
    if not options.do_sample:
        # A model whose saved defaults are for sampling would warn that they have no effect.
        return named
    return {name: value for name, value in named.items() if value is not None}


def _show_comparison(answer: Answer, full: Answer) -> None:
    if answer.tokens == full.tokens:
        verdict = "identical"
    else:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(answer.tokens, full.tokens, strict=False)))
        verdict = f"different from token {same + 1} on"
    print(f"\nanswer with the full cache ({verdict}):\n{full.text}", file=sys.stderr)


def _show_bytes(model: "PreTrainedModel", answer: Answer, full: Answer | None) -> None:
    """Print the bytes of the cache against those of the full cache; `full` is the run that measured them, None to
    compute them."""
    from rich.console import Console
    from rich.table import Table

    from ..inference.cache import CapsuleCache

    rows = []
    if isinstance(answer.cache, CapsuleCache):
        held = answer.cache.bytes()
        rows += [
            Row("visual", f"{held.visual:,}"),
            Row("text", f"{held.text:,}"),
            Row("tail", f"{held.tail:,}", "tokens written since, with room to grow"),
        ]
        if held.other:
            rows.append(Row("other", f"{held.other:,}", "the model's own layers"))
        rows.append(Row("total", f"{held.total:,}", f"measured, {answer.cache.get_seq_length()} tokens"))
        if held.parameters:
            rows.append(
                Row("codec maps", f"{held.parameters:,}", "parameters, once for all sequences; not in the total")
            )
        whole, origin = (
            (_computed_bytes(model, answer.cache), f"computed, {answer.cache.get_seq_length()} tokens")
            if full is None
            else (_measured_bytes(full.cache), f"measured, {full.cache.get_seq_length()} tokens")
        )
        rows += [
            Row("full cache", f"{whole:,}", origin),
            Row("ratio", f"{whole / held.total:.2f}", "full cache / total"),
        ]
    else:
        rows.append(
            Row("full cache", f"{_measured_bytes(answer.cache):,}", f"measured, {answer.cache.get_seq_length()} tokens")
        )
    table = Table("cache", "bytes", "", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=True, highlight=False)
    console.print()
    console.print(table)


def _computed_bytes(model: "PreTrainedModel", cache: "CapsuleCache") -> int:
    """What the model's own cache would hold for the tokens of `cache`, from its geometry; layers that both hold alike
    as measured."""
    from ..vlm.geometry import KVGeometry, full_attention_layers

    geometry = KVGeometry.from_config(model.config)
    token: int = 2 * geometry.kv_heads * geometry.head_dim * model.dtype.itemsize
    return len(full_attention_layers(model.config)) * token * cache.get_seq_length() + cache.bytes().other


def _measured_bytes(cache: "Cache") -> int:
    import torch

    from ..segments.segment import storage_bytes

    return storage_bytes(
        held for layer in cache.layers for held in vars(layer).values() if isinstance(held, torch.Tensor)
    )

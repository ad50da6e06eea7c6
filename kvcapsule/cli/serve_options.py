"""The options of `kvcapsule serve`; words that are none of them are vLLM's."""

import argparse
import re
from collections.abc import Sequence

from .counts import count
from .errors import Parser, dashed
from .sizes import MOST_BYTES

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    model: str
    capsule: str
    memory_bytes: int
    pool_share: float | None
    image_tokens: int | None
    text_tokens: int
    images: int
    store: str | None
    store_max_bytes: int
    block_size: int | None
    dtype: str
    dry_run: bool


def parsed(prog: str, words: Sequence[str]) -> tuple[Options, list[str]]:
    """The command's own options, and the words that are none of them; prog: the command's name."""
    return _parser(prog).parse_known_args([_spelled(word) for word in words], Options())


def _spelled(word: str) -> str:
    """Dashes in an option's name; its value stays as it is."""
    name, equals, value = word.partition("=")
    return (dashed(name) if name.startswith("--") else name) + equals + value


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        "Serve a vision-language model with capsules through vLLM's OpenAI server: the blocks of an image are given"
        " back once it is compressed. Options that are not listed here are vLLM's (such as --port, --max-model-len,"
        " --model-impl) and are handed on.",
    )
    parser.usage = f"{prog} MODEL --capsule NAME [OPTIONS] [OPTIONS OF VLLM]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a shipped model, a folder or an id on the Hub")
    add("--capsule", metavar="NAME", required=True, help="a shipped capsule, a folder or an id on the Hub")
    add(
        "--memory-bytes",
        metavar="BYTES",
        type=_bytes,
        default=4 * 2**30,
        help="memory of the KV cache and the capsule pool together, such as 4GB or 512MiB (default: 4GiB)",
    )
    add(
        "--pool-share",
        metavar="SHARE",
        type=_share,
        help="part of it for the capsule pool, 0 to 1 (default: auto, which lets the most sequences run)",
    )
    add = parser.add_argument_group("the sequences that are expected").add_argument
    add("--images", metavar="N", type=count, default=1, help="images of a sequence (default: %(default)s)")
    add("--image-tokens", metavar="N", type=count, help="visual tokens of an image (default: those of 448x448 pixels)")
    add(
        "--text-tokens",
        metavar="N",
        type=count,
        default=128,
        help="other tokens, the answer's too (default: %(default)s)",
    )
    add = parser.add_argument_group("an image store, by which an image seen before is not read again").add_argument
    add("--store", metavar="PATH", help="its folder, made if missing, which several servers may share (default: none)")
    add(
        "--store-max-bytes",
        metavar="BYTES",
        type=_bytes,
        default=2 * 10**9,
        help="most bytes in it; what was used least recently goes first (default: 2GB)",
    )
    add = parser.add_argument_group("options of vLLM that are looked at").add_argument
    add("--block-size", metavar="N", type=count, help="tokens of a block (default: the smallest that fits the tiles)")
    add(
        "--dtype",
        default="auto",
        help="precision of the model and its cache (default: that of the model's config; on a CPU float32 is fastest)",
    )
    add("--dry-run", action="store_true", help="print the command line for vLLM's server, and do not start it")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?i?B?)", text, re.IGNORECASE)
    value = match and float(match[1]) * _UNITS.get(match[2].upper().removesuffix("B"), 0)
    if not value or value >= MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 4GB or 512MiB")
    return int(value)


def _share(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 0 to below 1")
    return value

"""`kvcapsule serve`: vLLM's OpenAI server with capsules, and one memory budget for its KV cache and the capsule pool.

What is not an option of this command is an option of vLLM, and is handed on. Libraries are imported inside functions:
`--help` and a mistyped option do not wait for them.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, KVCapsuleError
from .counts import count
from .errors import Parser, complain, dashed
from .sizes import MOST_BYTES

if TYPE_CHECKING:
    from ..serving.budget import Form, Sizes

PROG = "kvcapsule serve"
WORKER = "kvcapsule.serving.worker.CapsuleWorker"
OWN = {
    "--kv-transfer-config": "--capsule and --memory-bytes say what goes into it",
    "--worker-cls": "it is kvcapsule's own",
    "--scheduler-cls": "it is kvcapsule's own where there is an image store",
    "--kv-cache-memory-bytes": "--memory-bytes is divided between the KV cache and the capsule pool",
    "--num-gpu-blocks-override": "--memory-bytes is divided between the KV cache and the capsule pool",
}
"""Options of vLLM that this command sets, and why they cannot be given."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SPACE = "VLLM_CPU_KVCACHE_SPACE"


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


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser, options = _parser(), Options()
    known, rest = parser.parse_known_args([_spelled(word) for word in words], options)
    try:
        words = command_line(known, rest)
        if known.dry_run:
            print(json.dumps(words))
            return 0
        serve(words)
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0


def command_line(options: Options, rest: Sequence[str]) -> list[str]:
    """The command line for vLLM's server.

    Args:
        options: of this command.
        rest: words that are none of its options.

    Raises:
        KVCapsuleError: for what cannot be served.
    """
    names = {word.partition("=")[0] for word in rest if word.startswith("--")}
    for name in sorted(names & set(OWN)):
        raise ConfigError(f"{name} cannot be given: {OWN[name]}.")
    if rest and not rest[0].startswith("-"):
        raise ConfigError(f"{rest[0]!r} is no option: the model comes first, then options with their values.")
    if os.environ.get(_SPACE):
        raise ConfigError(f"{_SPACE} is set, and vLLM would take it in place of --memory-bytes: unset it.")

    from kvcapsule.checkpoints import shipped

    from ..serving.settings import CONNECTOR, SCHEDULER
    from ..serving.version import require_supported_vllm

    require_supported_vllm()
    from ..serving.budget import divide, summary

    sizes, form, layers = _sizes(options)
    budget = divide(options.memory_bytes, sizes, form, options.pool_share)
    for line in summary(sizes, form, budget, layers):
        print(f"{PROG}: {line}.", file=sys.stderr, flush=True)
    extra = {
        "capsule": options.capsule,
        # A pool has one slot at least.
        "pool_bytes": budget.pool_bytes(sizes) or sizes.slot_bytes,
        "image_tokens": form.image_tokens,
        "text_tokens": form.text_tokens,
    }
    if options.store is not None:
        extra |= {"store": str(Path(options.store).expanduser().absolute()), "store_max_bytes": options.store_max_bytes}
    transfer = {"kv_connector": CONNECTOR, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    words = [
        str(shipped(options.model) or options.model),
        *("--dtype", options.dtype, "--block-size", str(sizes.block), "--worker-cls", WORKER),
        *("--kv-cache-memory-bytes", str(budget.block_bytes(sizes)), "--kv-transfer-config", json.dumps(transfer)),
    ]
    if options.store is not None:
        words += ["--scheduler-cls", SCHEDULER]
    if not names & {"--enforce-eager", "--no-enforce-eager"}:
        words.append("--enforce-eager")
    if shipped(options.model) is not None and "--served-model-name" not in names:
        words += ["--served-model-name", options.model]
    return [*words, *rest]


def serve(words: Sequence[str]) -> None:
    """Start vLLM's server, in this process, with a command line that its own parser reads."""
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class OneLine(FlexibleArgumentParser):
        """vLLM's parser prints all of its options before it says what is wrong."""

        def error(self, message: str) -> Any:
            self.exit(complain(PROG, f"vLLM's options: {message}"))

    cli_env_setup()
    arguments = make_arg_parser(OneLine(prog=PROG)).parse_args(list(words))
    configure_logging_from_args(arguments)
    validate_parsed_serve_args(arguments)
    # As vLLM's own command does; its server reads the model from there.
    arguments.model = arguments.model_tag or arguments.model
    uvloop.run(run_server(arguments))


def _sizes(options: Options) -> tuple["Sizes", "Form", tuple[int, int]]:
    """Of a block, a slot and the expected sequence, from the model's config and the capsule, and how many layers are
    compressed of how many. No weights of the model are loaded."""
    from ..capsule.capsule import Capsule
    from ..model_counts import count_visual_tokens, read_config
    from ..serving.budget import Form, Sizes
    from ..serving.pool import one_tile, slot_bytes
    from ..serving.rotation import RotaryEmbedding
    from ..vlm.geometry import KVGeometry, full_attention_layers
    from ..vlm.loading import DTYPES

    config = read_config(options.model, None)
    geometry, layers = KVGeometry.from_config(config), full_attention_layers(config)
    capsule = Capsule.from_pretrained(options.capsule)
    capsule.require_geometry(geometry)
    codec = capsule.config.codec
    block = options.block_size or _block(codec.tile, codec.align)
    if codec.tile % block:
        raise ConfigError(
            f"--block-size {block} does not divide the capsule's tiles of {codec.tile} tokens, so that no block could"
            " be given back."
        )
    text = config.get_text_config(decoder=True)
    named = options.dtype if options.dtype != "auto" else str(text.dtype or config.dtype or "float32")
    options.dtype = named.removeprefix("torch.")
    if options.dtype not in DTYPES:
        raise ConfigError(f"--dtype {options.dtype}: choose auto, {', '.join(DTYPES)}.")
    dtype = DTYPES[options.dtype]
    rotary = RotaryEmbedding(config) if geometry.rotary != "none" else None
    slot = slot_bytes(one_tile(capsule, layers, dtype, rotary.first(codec.tile) if rotary else None))
    token = 2 * len(layers) * geometry.kv_heads * geometry.head_dim * dtype.itemsize
    visual = options.image_tokens
    if visual is None:
        visual = count_visual_tokens(config, options.model, None, 1, _PICTURE)
    form = Form(options.images * visual, options.text_tokens, options.images)
    return Sizes(block, block * token, codec.tile, slot), form, (len(layers), geometry.layers)


_PICTURE = (448, 448)
"""Pixels of the image whose tokens are expected, unless --image-tokens says how many."""
_CPU_BLOCK = 32
"""Blocks of vLLM's CPU backend hold a multiple of so many tokens."""


def _block(tile: int, align: int) -> int:
    """The smallest block size that divides the tile and keeps to what the capsule was trained for: small blocks lose
    least at an image's ends."""
    fitting = [size for size in range(_CPU_BLOCK, tile + 1, _CPU_BLOCK) if tile % size == 0 and size % align == 0]
    if not fitting:
        raise ConfigError(
            f"the capsule's tiles of {tile} tokens (aligned at {align}) hold no whole blocks of vLLM's CPU backend,"
            f" whose sizes are multiples of {_CPU_BLOCK}: take a capsule trained with --codec.align {_CPU_BLOCK}, such"
            " as pages-vlm-blocks."
        )
    return fitting[0]


def _spelled(word: str) -> str:
    """Dashes in an option's name; its value stays as it is."""
    name, equals, value = word.partition("=")
    return (dashed(name) if name.startswith("--") else name) + equals + value


def _parser() -> Parser:
    parser = Parser(
        PROG,
        "Serve a vision-language model with capsules through vLLM's OpenAI server: the blocks of an image are given"
        " back once it is compressed. Options that are not listed here are vLLM's (such as --port, --max-model-len,"
        " --model-impl) and are handed on.",
    )
    parser.usage = f"{PROG} MODEL --capsule NAME [OPTIONS] [OPTIONS OF VLLM]"
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

"""`kvcapsule serve`: vLLM's OpenAI server with capsules, and one memory budget for its KV cache and the capsule pool.

What is not an option of this command is an option of vLLM, and is handed on. Libraries are imported inside functions:
`--help` and a mistyped option do not wait for them.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, KVCapsuleError
from .errors import complain
from .serve_options import Options, parsed

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
_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    known, rest = parsed(PROG, words)
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

"""`kvcapsule train`."""

import shlex
import sys

from kvcapsule.cli.errors import INTERRUPTED, complain
from kvcapsule.errors import KVCapsuleError

from .command_help import HELP, help_text
from .options import parse

PROG = "kvcapsule train"


def main(argv: list[str] | None = None) -> int:
    """Train a capsule; returns the exit code: 2, and one line on stderr, for input that cannot be used; 130 for an
    interrupt."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(word in HELP for word in words):
            print(help_text(words))
            sys.exit(0)
        recipe = parse(words, lambda line: print(f"{PROG}: {line}", file=sys.stderr))
        # --help and a mistyped option do not wait for torch.
        from .fit import train
        from .output_folder import how_to_go_on

        try:
            train(recipe)
        except KeyboardInterrupt:
            print(
                f"\n{PROG}: interrupted. {how_to_go_on(recipe, shlex.join([*PROG.split(), *words]))}", file=sys.stderr
            )
            return INTERRUPTED
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0

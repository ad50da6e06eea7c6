"""`kvcapsule train`."""

import sys

from kvcapsule.cli.errors import complain
from kvcapsule.errors import KVCapsuleError

from .fit import train
from .options import full_help, parse

PROG = "kvcapsule train"


def main(argv: list[str] | None = None) -> int:
    """Train a capsule; returns the exit code: 2, and one line on stderr, for input that cannot be used."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in ("-h", "--help"):
            print(full_help())
            sys.exit(0)
        train(parse(words, lambda line: print(f"{PROG}: {line}", file=sys.stderr)))
    except KVCapsuleError as error:
        return complain(PROG, error)
    return 0

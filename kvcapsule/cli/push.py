"""`kvcapsule push`: upload a capsule to the Hugging Face Hub.

The Hub's client is imported inside `main`: `--help` and a mistyped option do not wait for it.
"""

import argparse

from .errors import Parser, complain

PROG = "kvcapsule push"


class Options(argparse.Namespace):
    """The parsed command line; help texts are in `_parser`."""

    capsule: str
    repo_id: str
    private: bool
    revision: str | None


def main(argv: list[str] | None = None) -> int:
    """Print the address of what was pushed and return 0; if nothing was, say why in one line on stderr and return 2."""
    options = _parser().parse_args(argv, namespace=Options())
    from ..capsule.hub import Destination
    from ..capsule.push import push_directory
    from ..errors import CapsuleError

    try:
        url = push_directory(options.capsule, Destination(options.repo_id, options.private, options.revision))
    except CapsuleError as error:
        return complain(PROG, error)
    print(url)
    return 0


def _parser() -> Parser:
    parser = Parser(prog=PROG, description="Upload a capsule to the Hugging Face Hub in one commit.")
    parser.add_argument(
        "capsule", metavar="CAPSULE_DIR", help="folder that `kvcapsule train` wrote, or the name of a shipped capsule"
    )
    parser.add_argument(
        "repo_id", metavar="REPO_ID", help="organisation/name or user/name; created if it does not exist"
    )
    parser.add_argument(
        "--private", action="store_true", help="create the repository as private; one that is public already is refused"
    )
    parser.add_argument(
        "--revision", metavar="R", help="branch to push to, created if it does not exist (default: main)"
    )
    return parser

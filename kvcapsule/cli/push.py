"""kvcapsule push: upload a capsule to the Hugging Face Hub."""

import argparse
import sys

PROGRAM = "kvcapsule push"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Upload a capsule to the Hugging Face Hub in one commit.")
    parser.add_argument("capsule", metavar="CAPSULE_DIR", help="a directory that `kvcapsule train` wrote, or the name of a shipped capsule")
    parser.add_argument("repo_id", metavar="REPO_ID", help="organisation/name or user/name; created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private; a public one is refused")
    parser.add_argument("--revision", metavar="R", help="branch to push to, created if it does not exist (default: main)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print the address of what was pushed. Exit code 2 if it was not, with one line that says why."""
    arguments = parser().parse_args(argv)
    from ..capsule import CapsuleError
    from ..hub import push

    try:
        url = push(arguments.capsule, arguments.repo_id, private=arguments.private, revision=arguments.revision)
    except CapsuleError as error:
        print(f"{PROGRAM}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(url)
    return 0

"""A Python process in which chosen packages are not installed."""

import subprocess
import sys
from collections.abc import Iterable

_HIDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hidden!r}


class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
"""


def run_without(hidden: Iterable[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process that finds none of the `hidden` top-level modules."""
    source = _HIDE.format(hidden=sorted(hidden)) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=240)

"""What a command imports, and the CPU time that it takes, before it begins its work."""

import os
import subprocess
import sys

import pytest

from kvcapsule.cli import COMMANDS

HEAVY = {"torch", "transformers", "lightning", "datasets", "matplotlib", "numpy", "sklearn", "PIL"}
HELP_SECONDS = 0.6
"""CPU seconds that `--help` of any command may take."""
SLACK = 2
"""Times a machine may be slower than the one that the limits are for."""
QUICK = [
    *([name, "--help"] for name in COMMANDS),
    ["train", "compact", "--help"],
    ["models"],
    ["models", "--wide"],
]
MISTYPED = [[name, "--no-such-option"] for name in COMMANDS if name != "serve"]
"""serve hands options that are not its own to vLLM."""


@pytest.mark.parametrize("words", [*QUICK, *MISTYPED], ids=" ".join)
def test_no_library_is_imported(words: list[str]) -> None:
    code = (
        "import sys\nfrom kvcapsule.cli import main\n"
        f"try:\n    main({words!r})\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.split())
    assert "kvcapsule.cli" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_seconds_of_cpu(words: list[str]) -> None:
    """Of a whole process, the best of three: other work on the machine slows one down, too."""
    assert min(seconds(words) for _ in range(3)) < SLACK * HELP_SECONDS


def seconds(words: list[str]) -> float:
    process = subprocess.Popen([sys.executable, "-m", "kvcapsule", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    # Nobody else may wait for it again.
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime

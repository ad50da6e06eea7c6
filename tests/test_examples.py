"""Every example runs as it stands, and prints what it promises."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PRINTED = {
    "threads.py": [
        "pages-vlm-cross-layer: 'asp 8536', 10,043 bytes of visual KV",
        "pages-vlm-transform: 'asp 8536', 10,043 bytes of visual KV",
    ],
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_runs(name: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == PRINTED[name]

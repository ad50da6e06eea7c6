"""Disks that may only be read, are full or become full, mounted as such: each command refuses them in one line, before
its work where that can be known, and leaves what was there."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "mounted_places.py"


def may_mount() -> bool:
    """Whether this process may mount disks that no other one sees."""
    try:
        tried = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        return subprocess.run(tried, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not may_mount(), reason="mounting is for a superuser of Linux")
def test_disks_that_cannot_be_written(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(SCRIPT), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    came = json.loads(done.stdout)
    lines = {name: tuple(value) for name, value in came.items() if ": " in name}
    assert len(lines) == 25
    for name, (code, said) in lines.items():
        reason = "Read-only file system" if name.startswith("read-only") else "the disk is full"
        assert code == 2 and said.count("\n") == 1 and reason in said, (name, code, said)
        assert said.startswith(f"kvcapsule {name.split()[1]}: ")
    assert came["a state"] == errno.ENOSPC
    assert came["a capsule"] == [errno.EROFS, errno.ENOSPC, errno.ENOSPC]
    assert came["untouched"]

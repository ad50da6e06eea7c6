"""Run command lines, each in a process of its own, whose outputs lie on a disk that may only be read, one that is full
and one that becomes full; print what came of them as JSON.

Needs a mount namespace: `unshare --mount python mounted_places.py FOLDER`. tests/cli/test_mounts.py runs it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "KVCAPSULE_KERNELS": "reference"}

import torch

import kvcapsule.eval.bench.main
import kvcapsule.eval.main
import kvcapsule.eval.run
import kvcapsule.training.analysis.main
import kvcapsule.training.fit  # noqa: F401 - here, and not in each process
from kvcapsule import Capsule, CapsuleError, ImageStore
from kvcapsule.cli import main
from kvcapsule.store.entry import StoreKey
from kvcapsule.training.run_state import write_whole
from support.capsule_files import fixed_capsule

LEFT = 24_576
"""Bytes that are free on the disk that becomes full."""


def mounted(folder: Path, size: int) -> Path:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    fixed_capsule().save_pretrained(folder / "c")
    store = ImageStore(folder / "store", max_bytes=10**6)
    for name in "ab":
        store.put(StoreKey(name), 3000 * name.encode())
    return folder


def fill(folder: Path, left: int) -> None:
    status = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(status.f_bavail * status.f_frsize - left))


def outputs(place: Path) -> dict[str, list[str]]:
    """Every option that names what is written, in command lines that are refused before a model is loaded."""
    study = ["--data.size", "4", "--methods", "int4"]
    lines = {
        "train --output": ["train", "--output", f"{place}/t"],
        "eval --json": ["eval", *study, "--json", f"{place}/e.json"],
        "eval --plot": ["eval", *study, "--plot", f"{place}/e.png"],
        "eval --report": ["eval", "--suite", "policies", "--report", f"{place}/e.md"],
        "analyze --json": ["analyze", "--json", f"{place}/a.json"],
        "analyze --plots": ["analyze", "--plots", f"{place}/plots"],
        "bench --json": ["bench", "--quick", "--json", f"{place}/b.json"],
        "bench --plot": ["bench", "--quick", "--plot", f"{place}/b.png"],
        "bench --report": ["bench", "--quick", "--report", f"{place}/b.md"],
        "estimate --json": ["estimate", "--model", "pages-vlm", "--visual-tokens", "196", "--json", f"{place}/m.json"],
        "methods --json": ["methods", "--json", f"{place}/m.json"],
        "models --json": ["models", "--json", f"{place}/m.json"],
        "store --json": ["store", f"{place}/store", "list", "--json", f"{place}/l.json"],
    }
    if place.name == "full":
        # A folder of a run is made there, and what is written first is its record, after the model is loaded.
        del lines["train --output"]
    return lines


def come_of(act: Callable[[], int], room: Path) -> tuple[int, str]:
    """Exit code and stderr of a function in a process of its own."""
    said = room / "stderr"
    child = os.fork()
    if not child:
        code = 99
        try:
            for descriptor, name in ((1, os.devnull), (2, said)):
                os.dup2(os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
            code = act()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), said.read_text()


def errno_of(act: Callable[[], object]) -> int:
    """The number of the OSError that a function raises, or that is the cause of its CapsuleError; 0 for none."""
    try:
        act()
    except CapsuleError as error:
        assert isinstance(error.__cause__, OSError)
        return error.__cause__.errno or -1
    except OSError as error:
        return error.errno or -1
    return 0


def run(room: Path) -> dict[str, object]:
    read_only, full, filling = (mounted(room / name, 2**20) for name in ("read-only", "full", "filling"))
    subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
    fill(full, 0)
    fill(filling, LEFT)
    came: dict[str, object] = {
        f"{place.name}: {name}": come_of(lambda words=words: main(words), room)  # type: ignore[misc]
        for place in (read_only, full)
        for name, words in outputs(place).items()
    }
    large = fixed_capsule(salt=1, metadata={"text": "x" * 2 * LEFT})
    before = {place.name: sorted(os.listdir(place)) for place in (read_only, full, filling)}
    came["a state"] = errno_of(lambda: write_whole({"x": torch.zeros(LEFT)}, filling / "last.ckpt"))
    came["a capsule"] = [errno_of(lambda at=at: large.save_pretrained(at / "c")) for at in (read_only, full, filling)]
    came["untouched"] = all(
        sorted(os.listdir(place)) == before[place.name] and Capsule.from_pretrained(place / "c") is not None
        for place in (read_only, full, filling)
    )
    return came


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]))))

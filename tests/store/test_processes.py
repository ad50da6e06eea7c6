"""Several processes on one folder, some of them killed while they write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvcapsule import ImageStore
from kvcapsule.store.folder import PARTIAL

BUDGET = 60_000
WORKER = (
    """
import random, sys, time
from kvcapsule.store.entry import StoreKey
from kvcapsule.store.image_store import ImageStore

path, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
draw = random.Random(seed)
store = ImageStore(path, max_bytes=%d)
print("ready", flush=True)
end = time.monotonic() + seconds
while time.monotonic() < end:
    name = draw.randrange(30)
    data = bytes([name]) * (1000 + 300 * name)
    key = StoreKey.of({"image": name})
    got = store.get(key)
    assert got in (None, data), "another image's bytes"
    if got is None:
        assert store.put(key, data)
    if draw.random() < 0.02:
        store.prune(BUDGET // 2)
assert store.statistics.damaged == 0 and store.statistics.refused == 0
print(store.statistics.hits, store.statistics.puts, store.statistics.evictions)
""".replace("BUDGET", str(BUDGET))
    % BUDGET
)


def start(path: Path, seed: int, seconds: float) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", WORKER, str(path), str(seed), str(seconds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def remove_litter(store: ImageStore) -> None:
    """What is half written is a minute old from now on."""
    assert store.path is not None
    for partial in store.path.glob(f".*{PARTIAL}"):
        os.utime(partial, (time.time() - 90,) * 2)
    store.prune(store.max_bytes)


def test_processes_share_a_folder_and_some_are_killed(tmp_path: Path) -> None:
    lasting = [start(tmp_path, seed, 2) for seed in range(2)]
    # Each is stopped somewhere in its work, and then killed there.
    for seed in range(2, 8):
        doomed = start(tmp_path, seed, 60)
        try:
            doomed.wait(0.03 * seed)
        except subprocess.TimeoutExpired:
            os.kill(doomed.pid, signal.SIGKILL)
        assert doomed.wait() == -signal.SIGKILL
        doomed.communicate()
    counts = []
    for process in lasting:
        out, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        counts.append([int(word) for word in out.split()])
    assert all(count > 0 for row in counts for count in row)
    store = ImageStore(tmp_path, max_bytes=BUDGET)
    assert store.check() == []
    remove_litter(store)
    assert 0 < store.total_bytes() <= BUDGET and store.entries()
    assert not list(tmp_path.glob(f".*{PARTIAL}"))


def test_a_writer_killed_in_the_midst_leaves_no_entry(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom kvcapsule.store.entry import StoreKey\n"
        "from kvcapsule.store.image_store import ImageStore\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ImageStore(sys.argv[1], max_bytes=10**6).put(StoreKey('a'), b'a' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(f".*{PARTIAL}"))) == 1, "it was not killed in the midst"
    store = ImageStore(tmp_path, max_bytes=10**6)
    assert store.check() == [] and store.entries() == []
    remove_litter(store)
    assert not list(tmp_path.glob(f".*{PARTIAL}"))

"""kill -9 in the middle of a storm of requests, again and again, on one image store.

    python tests/serving/kills.py --times 10 --json eval/results/serving-kills.json

After each the store must check clean, and what is in it must serve: at the end the last server's answers are those of a
server with an empty store. It ends with an error where that is not so.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import soak
from support.serving_server import serving

from kvcapsule.environment import machine, versions
from kvcapsule.store.image_store import ImageStore

STORE_BYTES = 10**9
_SECONDS = 0.15
"""By how much later each kill comes, behind the first image that the server stores: so that they meet other moments."""
_PATIENCE = 120.0
"""Seconds within which a server must have stored an image."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    options = soak.Options(requests=400, aborted=0.0)
    planned = soak.plan(options)
    shown = soak.pictures(planned)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images"
        words = [*soak.words(options), "--store-max-bytes", str(STORE_BYTES), "--store"]
        kills = [kill(Path(folder), [*words, str(path)], number, planned, shown) for number in range(parsed.times)]
        every = soak.to_compare(planned)[:40]
        with serving(Path(folder) / "last.log", *words, str(path)) as server:
            answers = asyncio.run(soak.alone(server, every, shown))
            hits = server.metrics()["vllm:kvcapsule_store_hits_total"]
        with serving(Path(folder) / "empty.log", *words, str(Path(folder) / "empty")) as server:
            expected = asyncio.run(soak.alone(server, every, shown))
    same = sum(answers[asked] == expected[asked] for asked in every)
    result: dict[str, Any] = {
        "kills": kills,
        "asked_afterwards": len(every),
        "store_hits_afterwards": hits,
        "as_with_an_empty_store": same,
        "machine": machine(),
        "versions": versions(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if parsed.json is not None:
        parsed.json.write_text(text + "\n", encoding="utf-8")
    damaged = sum(each["damaged"] for each in kills)
    return int(damaged > 0 or same < len(every) or hits == 0)


def kill(folder: Path, words: list[str], number: int, planned: Any, shown: dict[int, str]) -> dict[str, int]:
    """One server, killed with all of its processes while it answers; what the store holds then."""
    before = ImageStore(words[-1], max_bytes=STORE_BYTES).total_bytes() if number else 0
    with serving(folder / f"{number}.log", *words) as server:
        # Each time other images, so that entries are being written.
        mine = planned[number * len(planned) // 10 :]
        killer = threading.Thread(target=_kill, args=(server.process.pid, words[-1], before, number * _SECONDS))
        killer.start()
        with contextlib.suppress(Exception):
            asyncio.run(soak.storm(server, soak.Options(clients=16), mine, shown))
        killer.join()
    store = ImageStore(words[-1], max_bytes=STORE_BYTES)
    return {
        "entries": len(store.entries()),
        "bytes_written": store.total_bytes() - before,
        "damaged": len(store.check()),
    }


def _kill(process: int, store: str, before: int, later: float) -> None:
    """Kill a server and its processes once its store has grown, so many seconds later."""
    end = time.monotonic() + _PATIENCE
    while ImageStore(store, max_bytes=STORE_BYTES).total_bytes() <= before and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(later)
    os.killpg(process, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())

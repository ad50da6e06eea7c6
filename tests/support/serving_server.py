"""`kvcapsule serve` as a process of its own, and its clients."""

import base64
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

PATIENCE = 240
"""Seconds until a server must answer: two other programs may hold the cores."""


class Server:
    """A server that runs."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log

    def metrics(self) -> dict[str, float]:
        """Every number of /metrics, by its name, labels left out; numbers of one name are added."""
        values: dict[str, float] = {}
        for line in httpx.get(f"{self.url}/metrics", timeout=PATIENCE).text.splitlines():
            match = re.match(r"([a-zA-Z_:]+)(?:\{.*\})? ([-+.\deE]+)$", line)
            if match and "_created" not in match[1]:
                values[match[1]] = values.get(match[1], 0) + float(match[2])
        return values

    def answer(self, image: Image.Image | None, prompt: str, **options: Any) -> str:
        """The answer to a question about an image."""
        done = httpx.post(f"{self.url}/v1/chat/completions", json=body(image, prompt, **options), timeout=PATIENCE)
        done.raise_for_status()
        return str(done.json()["choices"][0]["message"]["content"])


def encoded(image: Image.Image) -> str:
    """A data URL."""
    file = io.BytesIO()
    image.save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(image: Image.Image | str | None, prompt: str, **options: Any) -> dict[str, Any]:
    """Of a chat completion, greedy; image: one, or its data URL."""
    url = encoded(image) if isinstance(image, Image.Image) else image
    content: list[dict[str, Any]] = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    content.append({"type": "text", "text": prompt})
    message = {"role": "user", "content": content}
    return {"model": "pages-vlm", "messages": [message], "temperature": 0, "max_tokens": 120, **options}


def command(*words: str) -> list[str]:
    """`kvcapsule serve` for pages-vlm."""
    fixed = ["--model-impl", "transformers", "--max-model-len", "512"]
    return [sys.executable, "-m", "kvcapsule", "serve", "pages-vlm", *fixed, *words]


@contextlib.contextmanager
def serving(log: Path, *words: str) -> Iterator[Server]:
    """A server with these options, until the block ends.

    Args:
        log: file of what it prints.
        words: options beside `command`'s.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    # The server divides its own memory, and is no part of the tests' process.
    for name in ("VLLM_CPU_KVCACHE_SPACE", "TRITON_INTERPRET"):
        env.pop(name, None)
    with log.open("wb") as file:
        process = subprocess.Popen(
            command("--port", str(port), "--host", "127.0.0.1", *words),
            stdout=file,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        _await(server)
        yield server
    finally:
        _stop(process)


def _await(server: Server) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server does not answer:\n{server.log.read_text(errors='replace')[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """It and the processes that it started: they are a group of their own."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()

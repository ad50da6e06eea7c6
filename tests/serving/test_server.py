"""`kvcapsule serve` as a real server: answers over HTTP, what it counts, and a short soak."""

import asyncio
import os
import subprocess
from collections.abc import Iterator

import pytest
import soak
from support.serving_server import Server, command, serving

OPTIONS = soak.Options(requests=100, clients=16)

pytestmark = pytest.mark.slow  # a server in several processes, and many requests


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server") / "log", *soak.words(OPTIONS)) as started:
        yield started


def test_answers_metrics_and_a_short_soak(server: Server) -> None:
    planned = soak.plan(OPTIONS)
    shown = soak.pictures(planned)
    every = soak.to_compare(planned)
    assert server.metrics()["vllm:kvcapsule_images_compressed_total"] == 0
    expected = asyncio.run(soak.alone(server, every, shown))
    metrics = server.metrics()
    # One at a time, each image finds a slot.
    assert metrics["vllm:kvcapsule_images_compressed_total"] == len(every)
    assert metrics["vllm:kvcapsule_images_left_raw_total"] == 0
    assert metrics["vllm:kvcapsule_compression_seconds_total"] > 0
    assert metrics["vllm:kvcapsule_reading_seconds_total"] > 0
    assert metrics["vllm:kvcapsule_pool_total_bytes"] > 10_000
    assert metrics["vllm:kvcapsule_pool_used_bytes"] == 0
    assert {"vllm:kvcapsule_store_hits_total", "vllm:kvcapsule_store_misses_total"} <= set(metrics)
    log = server.log.read_text()
    assert "Capsules: 4 of 4 layers are compressed." in log
    assert "such sequences run at once, and" in log and "Capsules: a sequence of 196 visual and 24 other tokens" in log

    answers, metrics, _ = soak.weather(server, OPTIONS, planned, shown)
    result = soak.compare(planned, answers, expected)
    soak.add_metrics(result, metrics)
    assert soak.complaints(result) == []
    assert result.aborted >= 5 and result.images >= 25 and result.answered == 100 - result.aborted
    # The model misreads a digit here and there, alone as well.
    assert result.right >= 55
    assert metrics["vllm:num_preemptions_total"] > 0
    assert metrics["vllm:kvcapsule_images_compressed_total"] > len(every)


def test_a_wrong_option_of_vllm_is_one_line() -> None:
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    words = [*soak.words(OPTIONS), "--no-such-option", "3"]
    done = subprocess.run(command(*words), capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    line = [line for line in done.stderr.splitlines() if line.startswith("kvcapsule serve: ")][-1]
    assert "vLLM's options: unrecognized arguments: --no-such-option" in line and "usage:" not in done.stderr

"""`kvcapsule serve` as a real server: answers over HTTP, and what it counts."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import soak
from support.serving_server import command, serving

from kvcapsule.testbeds.pages import pages

OPTIONS = ("--capsule", "pages-vlm-blocks", "--memory-bytes", "2MB")


def test_answers_and_metrics(tmp_path: Path) -> None:
    rows = list(pages("test", 8, seed=3, tasks=("line", "lookup")))
    with serving(tmp_path / "log", *OPTIONS) as server:
        before = server.metrics()
        texts = [server.answer(row["image"], row["prompt"]) for row in rows]
        assert server.answer(None, "Read line 1.", max_tokens=3)
        metrics = server.metrics()
    assert sum(text.strip() == row["answer"].strip() for text, row in zip(texts, rows, strict=True)) >= 6
    assert before["vllm:kvcapsule_images_compressed_total"] == 0
    assert metrics["vllm:kvcapsule_images_compressed_total"] == len(rows)
    assert metrics["vllm:kvcapsule_images_left_raw_total"] == 0
    assert metrics["vllm:kvcapsule_compression_seconds_total"] > 0
    assert metrics["vllm:kvcapsule_reading_seconds_total"] > 0
    assert metrics["vllm:kvcapsule_pool_total_bytes"] > 10_000
    assert metrics["vllm:kvcapsule_pool_used_bytes"] == 0
    assert {"vllm:kvcapsule_store_hits_total", "vllm:kvcapsule_store_misses_total"} <= set(metrics)
    log = (tmp_path / "log").read_text()
    assert "Capsules: 4 of 4 layers are compressed." in log
    assert "such sequences run at once, and" in log and "Capsules: a sequence of 196 visual and 128 other tokens" in log


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--no-such-option", "3"], "vLLM's options: unrecognized arguments: --no-such-option"),
        (["--max-num-seqs", "many"], "vLLM's options: argument --max-num-seqs"),
    ],
    ids=["unknown", "value"],
)
def test_a_wrong_option_of_vllm_is_one_line(words: list[str], says: str) -> None:
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command(*OPTIONS, *words), capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 2
    line = [line for line in done.stderr.splitlines() if line.startswith("kvcapsule serve: ")][-1]
    assert says in line and "usage:" not in done.stderr


def test_dry_run_prints_what_vllm_is_told() -> None:
    done = subprocess.run(command(*OPTIONS, "--dry-run"), capture_output=True, text=True, check=True)
    assert "--kv-transfer-config" in json.loads(done.stdout.splitlines()[-1])


def test_a_short_soak(tmp_path: Path) -> None:
    options = soak.Options(requests=100, clients=8)
    result = soak.soak(options, tmp_path)
    assert soak.complaints(result) == []
    assert result.aborted >= 5 and result.images >= 25 and result.answered == 100 - result.aborted
    assert result.metrics["vllm:num_preemptions_total"] > 0
    assert result.metrics["vllm:kvcapsule_images_compressed_total"] >= result.answered

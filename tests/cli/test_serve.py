"""`kvcapsule serve` up to the command line that it hands to vLLM, which need not be installed."""

import json
import re
from pathlib import Path

import pytest

from kvcapsule.cli import main, serve_options
from kvcapsule.serving import version

WORDS = ["serve", "pages-vlm", "--capsule", "pages-vlm-blocks"]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "installed", lambda: "0.32.0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


def started(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """The command line for vLLM, and what was reported."""
    assert main([*WORDS, *words, "--dry-run"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def value(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    try:
        assert main(words) == 2
    except SystemExit as stop:
        assert stop.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    (line,) = printed.err.splitlines()
    assert line.startswith("kvcapsule serve: ")
    return line


def test_an_image_store(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, _ = started([], capsys)
    assert "--scheduler-cls" not in words and "store" not in value(words, "--kv-transfer-config")
    monkeypatch.chdir(tmp_path)
    words, _ = started(["--store", "images", "--store_max_bytes", "3GB"], capsys)
    assert value(words, "--scheduler-cls") == "kvcapsule.serving.scheduler.CapsuleScheduler"
    extra = json.loads(value(words, "--kv-transfer-config"))["kv_connector_extra_config"]
    assert (extra["store"], extra["store_max_bytes"]) == (str(tmp_path / "images"), 3 * 10**9)
    assert "--scheduler-cls cannot be given" in refused([*WORDS, "--scheduler-cls", "x", "--dry-run"], capsys)


def test_the_command_line_for_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    words, reported = started(["--memory-bytes", "1MiB", "--port", "8123", "--max_model_len=512"], capsys)
    assert words[0].endswith("checkpoints/pages-vlm") and "--enforce-eager" in words
    assert value(words, "--block-size") == "32" and value(words, "--dtype") == "float32"
    assert value(words, "--worker-cls") == "kvcapsule.serving.worker.CapsuleWorker"
    assert value(words, "--served-model-name") == "pages-vlm"
    assert words[-3:] == ["--port", "8123", "--max-model-len=512"]
    transfer = json.loads(value(words, "--kv-transfer-config"))
    extra = transfer["kv_connector_extra_config"]
    assert transfer["kv_connector"] == "CapsuleConnector" and extra["capsule"] == "pages-vlm-blocks"
    # Both parts are within the budget, and use nearly all of it.
    both = int(value(words, "--kv-cache-memory-bytes")) + extra["pool_bytes"]
    assert 2**20 - 2 * 65_536 < both <= 2**20
    assert all(line.startswith("kvcapsule serve: ") for line in reported.splitlines())
    assert "4 of 4 layers are compressed" in reported and "such sequences run at once" in reported


def test_more_sequences_than_without(capsys: pytest.CaptureFixture[str]) -> None:
    _, reported = started(["--memory-bytes", "4MB"], capsys)
    last = reported.splitlines()[-1]
    at_once, without = (int(number) for number in re.findall(r"\d+", last))
    assert at_once > 1.5 * without


def test_a_share_for_the_pool(capsys: pytest.CaptureFixture[str]) -> None:
    words, _ = started(["--memory-bytes", "4MB", "--pool-share", "0.25"], capsys)
    pool = json.loads(value(words, "--kv-transfer-config"))["kv_connector_extra_config"]["pool_bytes"]
    assert 900_000 < pool <= 1_000_000
    words, _ = started(["--memory-bytes", "4MB", "--pool-share", "auto"], capsys)
    assert json.loads(value(words, "--kv-transfer-config"))["kv_connector_extra_config"]["pool_bytes"] < 900_000


def test_what_the_user_says_of_vllm_stands(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--served-model-name", "mine", "--no-enforce-eager", "--dtype", "bfloat16"]
    words, _ = started([*names, "--block-size", "160", "--image-tokens", "400"], capsys)
    assert words.count("--served-model-name") == 1 and "--enforce-eager" not in words
    assert value(words, "--dtype") == "bfloat16" and value(words, "--block-size") == "160"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--kv-transfer-config", "{}"], "--kv-transfer-config cannot be given"),
        (["--worker-cls=x"], "--worker-cls cannot be given"),
        (["--kv-cache-memory-bytes", "5"], "--memory-bytes is divided"),
        (["--memory-bytes", "lots"], "'lots' is no number of bytes"),
        (["--memory-bytes", "10KB"], "10,000 bytes hold no sequence of 196 visual and 128 other tokens"),
        (["--pool-share", "1.5"], "neither auto nor a number"),
        (["--block-size", "64"], "--block-size 64 does not divide the capsule's tiles of 160 tokens"),
        (["--image-tokens", "100"], "holds no tile of 160"),
        (["stray"], "'stray' is no option"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(x),
)
def test_refused_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused([*WORDS, *words], capsys)


def test_other_things_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--capsule" in refused(["serve", "pages-vlm"], capsys)
    assert "MODEL" in refused(["serve", "--capsule", "pages-vlm-blocks"], capsys)
    assert "hold no whole blocks" in refused(["serve", "pages-vlm", "--capsule", "pages-vlm-transform"], capsys)
    assert "cannot read a config" in refused(["serve", "no-such-model", "--capsule", "pages-vlm-blocks"], capsys)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "4")
    assert "VLLM_CPU_KVCACHE_SPACE is set" in refused(WORDS, capsys)


def test_without_vllm_it_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "installed", lambda: None)
    line = refused(WORDS, capsys)
    assert "none is installed: run `pip install 'vllm==0.32.*'`" in line


@pytest.mark.parametrize(
    ("text", "number"), [("4GB", 4 * 10**9), ("512MiB", 2**29), ("1.5G", 1_500_000_000), ("7", 7), ("2kib", 2048)]
)
def test_bytes(text: str, number: int) -> None:
    assert serve_options._bytes(text) == number

"""What the plug-in may be told, and what it refuses by name: no vLLM is needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvcapsule.errors import ConfigError, ModelError
from kvcapsule.serving import plugin, version
from kvcapsule.serving.settings import CONNECTOR, Settings, is_chosen, refuse_unsupported


def config(**changed: Any) -> Any:
    """As much of a VllmConfig as is looked at, with what is served."""
    values: dict[str, Any] = {
        "parallel_config.tensor_parallel_size": 1,
        "parallel_config.pipeline_parallel_size": 1,
        "parallel_config.decode_context_parallel_size": 1,
        "cache_config.cache_dtype": "auto",
        "scheduler_config.async_scheduling": False,
        "model_config.enforce_eager": True,
        "model_config.multimodal_config": object(),
        "speculative_config": None,
        "lora_config": None,
        "use_v2_model_runner": False,
    }
    assert set(changed) <= set(values)
    built = SimpleNamespace(
        parallel_config=SimpleNamespace(),
        cache_config=SimpleNamespace(),
        model_config=SimpleNamespace(),
        scheduler_config=SimpleNamespace(),
    )
    for name, value in {**values, **changed}.items():
        part, _, last = name.rpartition(".")
        setattr(getattr(built, part) if part else built, last, value)
    return built


def test_what_is_served_is_not_refused() -> None:
    refuse_unsupported(config())


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("parallel_config.tensor_parallel_size", 2, "--tensor-parallel-size"),
        ("parallel_config.pipeline_parallel_size", 2, "--pipeline-parallel-size"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("speculative_config", object(), "--speculative-config"),
        ("lora_config", object(), "--enable-lora"),
        ("cache_config.cache_dtype", "fp8", "--kv-cache-dtype"),
        ("model_config.enforce_eager", False, "--enforce-eager"),
        ("scheduler_config.async_scheduling", True, "--no-async-scheduling"),
        ("use_v2_model_runner", True, "VLLM_USE_V2_MODEL_RUNNER"),
        ("model_config.multimodal_config", None, "no vision-language models"),
    ],
)
def test_each_option_that_is_not_supported(name: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        refuse_unsupported(config(**{name: value}))


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ({"capsule": "x", "tile": 3}, "has no tile; it has capsule, pool_bytes"),
        ({}, "names no capsule"),
        ({"capsule": "x", "store": 3}, "store 3: name a folder"),
        ({"capsule": "x", "store_max_bytes": -1}, "store_max_bytes -1: give the most bytes"),
        ({"capsule": "x", "pool_bytes": 0}, "pool_bytes 0: give the bytes"),
        ({"capsule": "x", "image_tokens": -1}, "image_tokens -1: give a number of tokens"),
        ({"capsule": "x", "pool_bytes": "4GB"}, "pool_bytes '4GB': give the bytes"),
    ],
)
def test_settings_that_there_are_not(extra: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Settings.of(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra)))


def test_settings_have_defaults() -> None:
    given = SimpleNamespace(kv_connector_extra_config={"capsule": "x"})
    assert Settings.of(SimpleNamespace(kv_transfer_config=given)) == Settings("x")


def test_chosen_by_the_connectors_name() -> None:
    assert is_chosen(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=CONNECTOR)))
    assert not is_chosen(SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector="OtherConnector")))
    assert not is_chosen(SimpleNamespace(kv_transfer_config=None))


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "1.0.0", None])
def test_another_vllm_is_refused_and_left_alone(found: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "installed", lambda: found)
    with pytest.raises(ModelError, match=r"serves with vLLM 0\.32, and .* is installed: run `pip install") as caught:
        version.require_supported_vllm()
    assert "\n" not in str(caught.value) and (found or "none") in str(caught.value)
    # Where vLLM is not installed, an import of it would fail here.
    plugin.register()


def test_a_patch_of_the_supported_version_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "installed", lambda: "0.32.4+cpu")
    version.require_supported_vllm()

"""What the plug-in does not do is refused by name, before anything is served."""

from dataclasses import replace
from typing import Any

import pytest
from support.serving_engine import WORKER, Engines, identity_capsule
from vllm.config import VllmConfig

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import ConfigError, GeometryError
from kvcapsule.serving.backend import CapsuleBackend


def test_vllms_config_has_what_is_looked_at() -> None:
    """vllm/config: the names that refuse_unsupported reads."""
    names = set(VllmConfig.__dataclass_fields__) | set(dir(VllmConfig))
    assert {
        "parallel_config",
        "cache_config",
        "model_config",
        "speculative_config",
        "lora_config",
        "scheduler_config",
    } <= names
    assert "use_v2_model_runner" in names


def raises(engines: Engines, says: str, *args: Any, error: type[Exception] = ConfigError, **options: Any) -> None:
    """An engine that does not start, for this reason."""
    with pytest.raises(error, match=says):
        engines(*args, **options)


def test_a_capsule_of_other_tiles(engines: Engines, tmp_path: Any) -> None:
    odd = identity_capsule("pages-vlm", 49, tmp_path / "odd")
    raises(engines, "tiles of 49 tokens are no multiple of the engine's block size 32", odd)


def test_a_capsule_of_another_model(engines: Engines, tile32: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Capsule.require_geometry
    monkeypatch.setattr(Capsule, "require_geometry", lambda self, geometry: fits(self, replace(geometry, layers=5)))
    raises(engines, "layers", tile32, error=GeometryError)


def test_too_small_a_pool(engines: Engines, tile32: str) -> None:
    raises(engines, "pool_bytes 1000: one tile takes", tile32, pool_bytes=1000)


def test_the_worker_without_the_connector(engines: Engines) -> None:
    raises(engines, "CapsuleWorker serves with the connector CapsuleConnector alone", worker_cls=WORKER)


def test_the_connector_without_the_worker(engines: Engines, tile32: str) -> None:
    """Nothing would compress: said before the first request."""
    raises(
        engines, "FullAttentionManager, not with kvcapsule's manager: is the worker class", tile32, worker_cls="auto"
    )
    assert not CapsuleBackend.chosen


def test_an_option_that_is_refused_stops_a_real_engine(engines: Engines, tile32: str) -> None:
    """Before the model is loaded and compiled."""
    raises(engines, "--enforce-eager", tile32, enforce_eager=False)

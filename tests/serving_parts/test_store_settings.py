"""For which engines an image store is opened: no vLLM is needed."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from kvcapsule.errors import ConfigError
from kvcapsule.serving.model_files import files_digest
from kvcapsule.serving.settings import Settings

NAME = "kvcapsule.serving.store_settings"


class _Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning(self, line: str, *values: Any) -> None:
        self.lines.append(line % values)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module, with as much of vLLM as it imports."""
    vllm, logger = ModuleType("vllm"), ModuleType("vllm.logger")
    vllm.__version__ = "0.32.0"  # type: ignore[attr-defined]
    logger.init_logger = lambda name: _Log()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.logger", logger)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    yield import_module(NAME)
    sys.modules.pop(NAME, None)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def config(model: Path | str, **changed: Any) -> Any:
    values = {"revision": None, "load_format": "auto", "download_dir": None, "model_weights": "", "ec": None}
    assert set(changed) <= set(values)
    values |= changed
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(model), revision=values["revision"], model_weights=values["model_weights"]
        ),
        load_config=SimpleNamespace(load_format=values["load_format"], download_dir=values["download_dir"]),
        ec_transfer_config=values["ec"],
    )


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings("x", store=str(tmp_path / "store"))


def test_opened(opened: Any, model: Path, settings: Settings) -> None:
    assert opened.open_store(Settings("x"), config(model)) is None
    _, files = opened.open_store(settings, config(model))
    assert files.wait() == files_digest(model)


def test_encoder_outputs_of_other_engines_are_refused(opened: Any, model: Path, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="--ec-transfer-config"):
        opened.open_store(settings, config(model, ec=object()))


@pytest.mark.parametrize("load_format", ["auto", "hf", "safetensors", "fastsafetensors", "mistral"])
def test_load_formats_that_read_the_folder(opened: Any, model: Path, settings: Settings, load_format: str) -> None:
    assert opened.open_store(settings, config(model, load_format=load_format)) is not None


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        *(({"load_format": name}, name) for name in ("dummy", "tensorizer", "sharded_state", "npcache", "custom")),
        ({"model_weights": "s3://bucket/model"}, "come from elsewhere, s3://bucket/model"),
    ],
)
def test_weights_that_are_not_the_folders(
    opened: Any, model: Path, settings: Settings, changed: dict[str, Any], says: str
) -> None:
    assert opened.open_store(settings, config(model, **changed)) is None
    (line,) = opened.logger.lines
    assert says in line and "The image store is not used" in line


def test_the_models_own_folder_may_be_named_twice(opened: Any, model: Path, settings: Settings) -> None:
    assert opened.open_store(settings, config(model, model_weights=str(model))) is not None


def test_a_folder_without_weights(opened: Any, model: Path, settings: Settings) -> None:
    (model / "model.safetensors").rename(model / "config.json")
    assert opened.open_store(settings, config(model)) is None


def test_the_folder_of_downloads(
    opened: Any, model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the Hub's library lays it out."""
    downloads = tmp_path / "downloads" / "models--some--vlm"
    (downloads / "refs").mkdir(parents=True)
    (downloads / "refs" / "main").write_text("a" * 40)
    (downloads / "snapshots").mkdir()
    model.rename(downloads / "snapshots" / ("a" * 40))
    assert opened.open_store(settings, config("some/vlm")) is None
    asked = config("some/vlm", download_dir=str(tmp_path / "downloads"))
    _, files = opened.open_store(settings, asked)
    assert files.folder == downloads / "snapshots" / ("a" * 40) and files.wait() is not None
    monkeypatch.setenv("VLLM_USE_MODELSCOPE", "True")
    assert opened.open_store(settings, asked) is None

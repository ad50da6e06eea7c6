"""Training, evaluation and analysis of a model on a device that is not the CPU (support/pretend_device.py) measure what
they do on the CPU, and no tensors of two devices meet."""

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from support import tiny_vlm
from support.pretend_device import DEVICE, pretended, to_device
from support.tiny_llava import llava
from support.tiny_training import FAMILY_OPTIONS, ROWS, TinyProcessor, data_words, questions, trained
from transformers import PreTrainedModel

from kvcapsule.eval.main import main as evaluate
from kvcapsule.training import lightning_run
from kvcapsule.training.analysis.main import main as analyze

_TRAINER = L.Trainer


class Accelerator(CPUAccelerator):
    """Lightning's, for a device that needs nothing of its own."""

    def setup_device(self, device: torch.device) -> None:
        return


def trainer(**options: Any) -> L.Trainer:
    strategy: Any = SingleDeviceStrategy(device=DEVICE, accelerator=Accelerator())
    return _TRAINER(**{**options, "accelerator": "auto", "strategy": strategy, "devices": 1}, inference_mode=False)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def source(tmp_path: Path) -> str:
    return questions(tmp_path, ROWS)


def load(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Have the commands load this model."""
    loaded = model, TinyProcessor(llava())
    for module in ("training.fit", "training.analysis.study", "eval.run"):
        monkeypatch.setattr(f"kvcapsule.{module}.load_vlm", lambda *_: loaded)


def assert_alike(here: Any, there: Any) -> None:
    """The same JSON but for rounding."""
    if isinstance(here, dict):
        assert there.keys() == here.keys()
        here, there = list(here.values()), list(there.values())
    if isinstance(here, list):
        assert len(there) == len(here)
        for one, other in zip(here, there, strict=True):
            assert_alike(one, other)
    elif isinstance(here, float):
        assert there == pytest.approx(here, rel=0.01, abs=1e-4)
    else:
        assert there == here


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_vlm.build("llava", llava())


@pytest.mark.parametrize("recipe", FAMILY_OPTIONS)
def test_training(
    recipe: str, model: PreTrainedModel, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, model)
    on_cpu = trained(source, recipe, tmp_path / "cpu")
    load(monkeypatch, to_device(copy.deepcopy(model)))
    monkeypatch.setattr(lightning_run.L, "Trainer", trainer)
    with pretended():
        there = trained(source, recipe, tmp_path / "there", "--device", DEVICE.type)
    assert there.keys() == on_cpu.keys()
    for name, value in on_cpu.items():
        if name != "seconds":
            # Another backend's rounding moves sums that bases and joint rounding follow.
            assert there[name] == pytest.approx(value, rel=0.1, abs=1e-6), name


def test_evaluation_and_analysis(
    model: PreTrainedModel, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(monkeypatch, model)
    trained(source, "transform", tmp_path / "capsule")
    unseen = questions(tmp_path, 4, first=ROWS)
    words = [*data_words(unseen), "--capsule", str(tmp_path / "capsule"), "--methods", "transform,int4", "--timing"]

    def measured(name: str, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
        answers, analysis = (tmp_path / f"{name}-{what}.json" for what in ("answers", "analysis"))
        options = ["false", "--max-new-tokens", "3", "--json", str(answers), "--device", device]
        assert evaluate([*words, *options]) == 0
        options = ["--tile", "4", "--json", str(analysis), "--device", device]
        assert analyze([*data_words(source), *options]) == 0
        found = json.loads(answers.read_text()), json.loads(analysis.read_text())
        return {row["method"]: row for row in found[0]["rows"]}, found[1]

    rows, studied = measured("cpu", "cpu")
    load(monkeypatch, to_device(copy.deepcopy(model)))
    with pretended():
        rows_there, studied_there = measured("there", DEVICE.type)
    assert rows_there.keys() == rows.keys() >= {"full", "transform", "int4"}
    for name, row in rows.items():
        for key in ("kv_bytes", "agreement", "kl"):
            assert rows_there[name][key] == pytest.approx(row[key], rel=1e-3, abs=1e-6), (name, key)
    assert_alike(studied["layers"], studied_there["layers"])

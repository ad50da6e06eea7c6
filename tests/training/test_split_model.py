"""A frozen model whose layers lie on two devices (support/pretend_device.py): each codec lies beside its layers, what
is trained is what one device trains, and the capsule gives the same tokens."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from accelerate.utils import send_to_device
from support import tiny_vlm
from support.pretend_device import DEVICE, pretended, to_device
from support.tiny_llava import llava
from support.tiny_training import FAMILY_OPTIONS, ROWS, TinyProcessor, data_words, questions, trained
from transformers import PreTrainedModel

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import CACHE_NAMES
from kvcapsule.training import lightning_run
from kvcapsule.training.main import main

pytestmark = pytest.mark.usefixtures("one_thread")
TILES, HEAD_DIM = 4, 8
FULL = 2 * 2 * TILES * 4 * 2 * HEAD_DIM * 2
"""Bytes of an image of 4 tiles of 4 tokens in 16 bits: keys and values of 2 layers with 2 KV heads."""
OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def placed(module: torch.nn.Module, device: torch.device) -> None:
    """What it is given comes to its device first, as under accelerate's hooks."""

    def bring(_: Any, args: Any, kwargs: Any) -> Any:
        skipped = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs}
        return send_to_device((args, kwargs), device)[0], {**send_to_device(kwargs, device), **skipped}

    module.register_forward_pre_hook(bring, with_kwargs=True)


def split(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose last layer lies on the other device."""
    model = copy.deepcopy(model)
    language = model.model.language_model
    first, last = language.layers
    to_device(last)
    placed(last, DEVICE)
    for module in (first, language.norm, model.lm_head):
        placed(module, torch.device("cpu"))
    model.hf_device_map = {"model.language_model.layers.1": DEVICE, "": "cpu"}
    return model


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_vlm.build("llava", llava())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return questions(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(autouse=True)
def no_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the pretended device does not know."""
    monkeypatch.setattr(lightning_run.L, "Trainer", partial(L.Trainer, inference_mode=False))


def load(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    monkeypatch.setattr("kvcapsule.training.fit.load_vlm", lambda *_: (model, TinyProcessor(llava())))


def devices(capsule: torch.nn.Module) -> list[str]:
    return [next(iter(layer.state_dict().values())).device.type for layer in capsule.layers]


ONE_LAYER = ["--transform.joint-layers", "1"]


@pytest.mark.parametrize("recipe", FAMILY_OPTIONS)
def test_training(
    recipe: str, model: PreTrainedModel, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ONE_LAYER if recipe == "cross-layer" else []
    load(monkeypatch, model)
    on_cpu = trained(source, recipe, tmp_path / "cpu", *more)
    load(monkeypatch, there_model := split(model))
    with pretended():
        there = trained(source, recipe, tmp_path / "there", *more, "--device", "auto")
    for name, value in on_cpu.items():
        if name not in ("seconds", "compression"):
            assert there[name] == pytest.approx(value, rel=0.1, abs=1e-6), name
    # Frames and owners of tiles lie on each of the devices.
    sizes = [FULL / metrics["compression"] for metrics in (on_cpu, there)]
    assert sizes[1] - sizes[0] == pytest.approx(TILES * (8 + 4 * HEAD_DIM))

    # One file of weights, on whatever devices a model lies.
    capsule = Capsule.from_pretrained(tmp_path / "there")
    inputs = tiny_vlm.batch(llava(), [5, 6, llava().picture(0), 7, 8], [3, llava().picture(1), 4])
    with attach(model, capsule):
        expected = model.generate(**inputs, **OPTIONS)
    with pretended(), attach(there_model, capsule):
        found = there_model.generate(**inputs, **OPTIONS)
    assert found.tolist() == expected.tolist()
    assert devices(capsule) == ["cpu", DEVICE.type]


def test_a_layer_group_on_two_devices_is_refused(
    model: PreTrainedModel,
    source: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load(monkeypatch, split(model))
    words = [*data_words(source), "--held_out", "4", "--codec.tile", "4", "--compression", "2", "--device", "auto"]
    with pretended():
        assert main(["cross-layer", *words, "--output", str(tmp_path / "there")]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "layers 0 to 1 are coded together and lie on several devices: give another --transform.joint-layers" in error

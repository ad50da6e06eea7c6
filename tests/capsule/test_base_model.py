"""A capsule knows its model: a fine-tune, a random model of its geometry and another adapter are noticed; the same
model in another place is not."""

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.capsule_files import fixed_capsule
from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule import Capsule, CapsuleCache, CapsuleError, GeometryError, attach
from kvcapsule.capsule.base_model import commit_of, record_of
from kvcapsule.capsule.local_names import is_local, portable
from kvcapsule.capsule.record import ModelRecord
from kvcapsule.checkpoints import shipped_names
from kvcapsule.errors import ModelMismatchWarning
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import Combined, SnapKV, TextPruning
from kvcapsule.training.testbeds.pages_vlm.model import build_model
from kvcapsule.vlm.license import license_of
from kvcapsule.vlm.loading import load_vlm

Model = LlavaForConditionalGeneration


@pytest.fixture
def capsule(identity: Callable[..., Capsule], model: Model) -> Capsule:
    """Of `model`, and knows it."""
    built = identity(49)
    built.config = replace(built.config, metadata={"model": record_of("tiny", model).to_dict()})
    return built


def tuned(model: Model) -> Model:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_decoder().layers[1].self_attn.k_proj.weight.mul_(1.001)
    return other


def test_the_same_model_is_taken_without_a_word(capsule: Capsule, model: Model, vlm: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ModelMismatchWarning)
        for same in (model, load_vlm(vlm)[0], copy.deepcopy(model).to(torch.bfloat16)):
            with attach(same, capsule, strict=True):
                pass


def test_shipped_capsules_know_the_shipped_model(model: Model) -> None:
    shipped = load_vlm("pages-vlm", device="cpu")[0]
    names = [name for name in shipped_names() if name.startswith("pages-vlm-")]
    assert len(names) >= 5
    for name in names:
        capsule = Capsule.from_pretrained(name)
        with attach(shipped, capsule, strict=True):
            pass
        with pytest.raises(CapsuleError, match="are others"), attach(model, capsule, strict=True):
            pass


def test_another_model_of_the_geometry_is_noticed(capsule: Capsule, model: Model, processor: LlavaProcessor) -> None:
    for other in (tuned(model), build_model(processor.tokenizer, seed=2)):
        says = "trained on 'tiny', and the weights of .* are others"
        with pytest.warns(ModelMismatchWarning, match=says), attach(other, capsule):
            pass
        with pytest.raises(CapsuleError, match="are others"), attach(other, capsule, strict=True):
            pass
    with pytest.warns(ModelMismatchWarning), attach(tuned(model), Combined(capsule, TextPruning(0.5))):
        pass


def test_a_cache_made_by_hand_is_noticed(
    capsule: Capsule, model: Model, make_batch: Callable[..., BatchFeature], identity: Callable[..., Capsule]
) -> None:
    batch, other = make_batch((1, "Read line 2.")), tuned(model)
    with attach(other), pytest.warns(ModelMismatchWarning) as heard:
        cache = CapsuleCache(other.config, capsule)
        other.generate(**batch, max_new_tokens=3, **cache_argument(cache))
    assert len(heard) == 1
    with attach(other, strict=True), pytest.raises(CapsuleError, match="are others"):
        other(**batch, **cache_argument(CapsuleCache(other.config, capsule)))
    with attach(other, strict=True):
        other(**batch, **cache_argument(CapsuleCache(other.config, SnapKV(0.5))))
    wide = identity(49)
    wide.config = replace(wide.config, geometry=replace(wide.config.geometry, kv_heads=4))
    with pytest.raises(GeometryError):
        CapsuleCache(model.config, wide)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_are_noticed(capsule: Capsule, model: Model) -> None:
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    adapted: Any = get_peft_model(copy.deepcopy(model), lora)
    with pytest.warns(ModelMismatchWarning, match="without an adapter, and one is active"), attach(adapted, capsule):
        pass
    of_adapted = copy.copy(capsule)
    record = record_of("tiny", adapted.get_base_model())
    of_adapted.config = replace(capsule.config, metadata={"model": record.to_dict()})
    with attach(adapted, of_adapted, strict=True):
        pass
    with pytest.warns(ModelMismatchWarning, match="with an adapter, and none is active"), attach(model, of_adapted):
        pass
    with adapted.disable_adapter(), attach(adapted, capsule, strict=True):
        pass


def test_strict_refuses_what_cannot_be_known(
    capsule: Capsule, model: Model, identity: Callable[..., Capsule], monkeypatch: pytest.MonkeyPatch
) -> None:
    with attach(model, identity(49)):
        pass
    with pytest.raises(CapsuleError, match="does not record the weights"), attach(model, identity(49), strict=True):
        pass
    quantised = copy.deepcopy(model)
    weight = quantised.get_decoder().layers[0].mlp.up_proj.weight
    quantised.get_decoder().layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), False)
    with attach(quantised, capsule):
        pass
    with pytest.raises(CapsuleError, match="cannot be compared"), attach(quantised, capsule, strict=True):
        pass


def test_the_record_survives_saving(capsule: Capsule, tmp_path: Path) -> None:
    capsule.save_pretrained(tmp_path / "saved")
    assert Capsule.from_pretrained(tmp_path / "saved").config == capsule.config


@pytest.mark.parametrize(
    "record", [[], {"weights": [1]}, {"weights": {"float32": 3}}, {"local": "yes"}, {"adapter": 2}, {"license": "mit"}]
)
def test_a_damaged_record_is_refused(tmp_path: Path, record: Any) -> None:
    with pytest.raises(CapsuleError, match=r"metadata\.model"):
        ModelRecord.of({"model": record})
    fixed_capsule().save_pretrained(tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "metadata": {"model": record}}))
    with pytest.raises(CapsuleError, match=r"config\.json: metadata\.model"):
        Capsule.from_pretrained(tmp_path / "c")


def test_commit_and_licence(model: Model, vlm: str, tmp_path: Path) -> None:
    assert commit_of(model) is None
    from_hub = copy.deepcopy(model)
    from_hub.config._commit_hash = "c0ffee"
    assert commit_of(from_hub) == "c0ffee"
    assert license_of("pages-vlm") == {"license": "apache-2.0"}
    assert license_of("nobody/no-such-model") == license_of(vlm) == license_of("../a b") == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\ntags: [a]\n---\n# A model\n")
    assert record_of(str(tmp_path), model).license == {"license": "other", "license_name": "gemma"}
    for text in ("no front matter", "---\nlicense: [a, b]\n---\n", "---\n{: }}\n---\n", "---\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(str(tmp_path)) == {}


def test_names_without_a_machines_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert [portable(name) for name in ("models/mine/", str(tmp_path / "models" / "mine"), "/gone/away")] == [
        "mine",
        "mine",
        "away",
    ]
    assert [portable(name) for name in ("org/vlm", "pages-vlm")] == ["org/vlm", "pages-vlm"]
    (tmp_path / "pages-vlm").mkdir()
    assert not is_local("pages-vlm")

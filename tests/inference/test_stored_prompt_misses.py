"""attach(..., store=...): whatever differs is a miss, and what is damaged is read anew."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import identity_capsule, transform_capsule
from support.family_models import OPTIONS
from support.stored_prompts import ROOM, TILE, Setting, assert_identical, hits

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.store.folder import SUFFIX


def change_nothing(setting: Setting, prompt: Any) -> None:
    pass


def another_image(setting: Setting, prompt: Any) -> None:
    prompt["pixel_values"] = prompt["pixel_values"].clone()
    prompt["pixel_values"].view(-1)[7] += 1e-3


def another_prefix(setting: Setting, prompt: Any) -> None:
    prompt["input_ids"][0, 0] = 4


def another_dtype(setting: Setting, prompt: Any) -> None:
    setting.model.to(torch.bfloat16)
    prompt["pixel_values"] = prompt["pixel_values"].to(torch.bfloat16)


def another_weight(setting: Setting, prompt: Any) -> None:
    with torch.no_grad():
        setting.model.model.vision_tower.get_parameter(
            next(iter(dict(setting.model.model.vision_tower.named_parameters())))
        ).add_(1e-3)


def another_weight_through_data(setting: Setting, prompt: Any) -> None:
    setting.model.lm_head.weight.data += 1e-3


def another_parameter(setting: Setting, prompt: Any) -> None:
    weight = setting.model.lm_head.weight
    setting.model.lm_head.weight = torch.nn.Parameter(weight.detach() + 1e-3, requires_grad=False)


def another_setting(setting: Setting, prompt: Any) -> None:
    # The other of the tiny tower's two.
    setting.model.config.vision_feature_layer = -3 - setting.model.config.vision_feature_layer


CHANGES = [another_image, another_prefix, another_dtype, another_weight, another_weight_through_data, another_parameter]


@pytest.mark.parametrize("within", [True, False], ids=["one attach", "attached anew"])
@pytest.mark.parametrize("change", [change_nothing, *CHANGES, another_setting])
def test_whatever_differs_is_a_miss(
    change: Callable[..., None], within: bool, llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    prompt = llava.prompt(0)
    if within:
        with attach(llava.model, capsule, store):
            llava.model.generate(**prompt, **OPTIONS)
            change(llava, prompt)
            out = llava.model.generate(**prompt, **OPTIONS)
    else:
        llava.ask(store, capsule, prompt)
        change(llava, prompt)
        out, _ = llava.ask(store, capsule, prompt)
    assert hits(store) == (change is change_nothing)
    assert_identical(out, llava.ask(ImageStore(None, max_bytes=ROOM), capsule, prompt)[0])


def test_another_capsule_is_a_miss(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt, other = llava.prompt(0), copy.deepcopy(capsule)
    llava.ask(store, capsule, prompt)
    with torch.no_grad():
        other.layers[0].keys.transform.offset.add_(0.1)
    llava.ask(store, other, prompt)
    assert hits(store) == 0
    llava.ask(store, copy.deepcopy(capsule), prompt)
    assert hits(store) == 1


def test_another_attention_or_an_equal_model_is_a_hit(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt = llava.prompt(0)
    llava.ask(store, capsule, prompt)
    llava.model.set_attn_implementation("eager")
    assert llava.ask(store, capsule, prompt)[1] == 0
    again = Setting(llava.of, copy.deepcopy(llava.of.model))
    assert again.ask(ImageStore(store.path, max_bytes=ROOM), capsule, prompt)[1] == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_told_apart(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    from peft import LoraConfig, get_peft_model

    prompt, states = llava.prompt(0), []
    targets = r".*language_model.*(q_proj|k_proj|v_proj)"

    def ask(model: Any) -> None:
        before = hits(store)
        with attach(model, capsule, store):
            model.generate(**prompt, **OPTIONS)
            states.append(hits(store) - before)
            model.generate(**prompt, **OPTIONS)
        assert hits(store) - before == states[-1] + 1

    ask(llava.model)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(llava.model, config, "one").eval()
    ask(model)
    model.add_adapter("two", config)
    model.eval()
    ask(model)
    model.set_adapter("two")
    ask(model)
    with model.disable_adapter():
        ask(model)
    layer = next(module for module in model.modules() if hasattr(module, "lora_alpha"))
    layer.scaling["two"] *= 2
    ask(model)
    model.merge_adapter()
    ask(model)
    assert states == [0] * 7
    ask(model)
    assert states[-1] == 1


def test_a_damaged_entry_is_read_anew(setting: Setting, store: ImageStore) -> None:
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    expected, _ = setting.ask(store, capsule, prompt)
    assert store.path is not None
    for file in store.path.glob(f"*{SUFFIX}"):
        file.write_bytes(file.read_bytes()[:-3])
    out, seen = setting.ask(store, capsule, prompt)
    assert_identical(out, expected)
    assert (seen, hits(store), store.statistics.damaged) == (2, 0, 1)
    assert setting.ask(store, capsule, prompt)[1] == 0 and store.check() == []


def test_what_is_no_span_or_of_another_place_is_a_miss(
    setting: Setting, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    capsule, prompt = transform_capsule(setting.of.geometry, TILE), setting.prompt(0, 1)
    expected, _ = setting.ask(store, capsule, prompt)
    second, first = (entry.header.key for entry in store.entries()[::-1] if entry.header)
    other = store.get(second)
    assert other is not None
    for wrong in (b"noise", other):
        before = store.statistics.damaged
        store.put(first, wrong)
        assert_identical(setting.ask(store, capsule, prompt)[0], expected)
        assert store.statistics.damaged == before + 1
    assert len(caplog.messages) == 1 and "an entry is not used" in caplog.messages[0]


def test_of_a_chain_the_last_images_go_first(llava: Setting, capsule: Capsule) -> None:
    memory = ImageStore(None, max_bytes=ROOM)
    llava.ask(memory, capsule, llava.prompt(0, 1))
    chain = [entry.header.about["text"] for entry in memory.entries() if entry.header]
    assert chain[0] == 3, "the first image, which has three tokens of text before it, is not the most recently used"


def test_identity_capsule_of_other_tiles_is_told_apart(llava: Setting, store: ImageStore) -> None:
    for tile in (4, 8):
        llava.ask(store, identity_capsule(llava.of.geometry, tile), llava.prompt(0))
    assert hits(store) == 0 and store.statistics.puts == 2

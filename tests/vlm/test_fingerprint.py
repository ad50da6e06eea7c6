"""The quick fingerprint of a model: equal for the same weights wherever they come from, another one for a fine-tune."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule.training.testbeds.pages_vlm.model import build_model
from kvcapsule.vlm.fingerprint import fingerprint
from kvcapsule.vlm.loading import load_vlm
from kvcapsule.vlm.weights import UnreadableError

Model = LlavaForConditionalGeneration


def with_lora(model: Model, name: str = "default", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(copy.deepcopy(model), config, adapter_name=name)


def test_it_is_that_of_the_weights_wherever_they_lie(model: Model, vlm: str, tmp_path: Path) -> None:
    expected = fingerprint(model)
    assert expected.dtype == "float32" and expected.adapter == ""
    assert fingerprint(copy.deepcopy(model)) == expected == fingerprint(load_vlm(vlm)[0])
    model.save_pretrained(tmp_path / "elsewhere", max_shard_size="1MB")
    assert fingerprint(AutoModelForImageTextToText.from_pretrained(tmp_path / "elsewhere")) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_the_same_model(model: Model, dtype: torch.dtype) -> None:
    cast = fingerprint(copy.deepcopy(model).to(dtype))
    assert cast.has_weights_of(fingerprint(model)) and fingerprint(model).has_weights_of(cast)


def test_what_was_saved_in_few_bits_is_the_same_in_more(model: Model) -> None:
    few = copy.deepcopy(model).to(torch.bfloat16)
    assert fingerprint(copy.deepcopy(few).float()).has_weights_of(fingerprint(few))
    assert not fingerprint(copy.deepcopy(few).float()).has_weights_of(fingerprint(model))


@pytest.mark.parametrize("part", ["q_proj", "multi_modal_projector", "vision_tower", "embed_tokens", "layers.3.mlp"])
def test_a_fine_tune_of_a_part_is_another_model(model: Model, part: str) -> None:
    """Steps of 1e-4 of the weights' size, far below the rounding of bfloat16."""
    tuned, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if part in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(1e-4 * parameter.abs().mean() * noise)
    changed = fingerprint(tuned)
    assert not changed.has_weights_of(fingerprint(model))
    assert not fingerprint(tuned.to(torch.bfloat16)).has_weights_of(fingerprint(model))


def test_a_random_model_of_the_geometry_is_another(model: Model, processor: LlavaProcessor) -> None:
    assert not fingerprint(build_model(processor.tokenizer, seed=2)).has_weights_of(fingerprint(model))


def test_changes_of_a_known_model_are_noticed(model: Model) -> None:
    one = copy.deepcopy(model)
    before, layer = fingerprint(one), one.get_decoder().layers[2].mlp.up_proj
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.mul_(1.01)
    assert fingerprint(one) != before
    layer.weight = torch.nn.Parameter(kept)
    assert fingerprint(one) == before


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_adapters_are_apart_from_the_weights(model: Model) -> None:
    wrapped = with_lora(model)
    inner = wrapped.get_base_model()
    adapted, plain = fingerprint(inner), fingerprint(model)
    assert adapted.weights == plain.weights and adapted.adapter
    assert fingerprint(with_lora(model, "other-name").get_base_model()).adapter == adapted.adapter
    assert fingerprint(with_lora(model, seed=1).get_base_model()).adapter not in (adapted.adapter, "")
    with wrapped.disable_adapter():
        assert fingerprint(inner) == plain
    wrapped.merge_adapter()
    merged = fingerprint(inner)
    assert not merged.has_weights_of(plain) and merged.adapter == ""
    wrapped.unmerge_adapter()
    assert fingerprint(inner).adapter == adapted.adapter


def test_what_cannot_be_read_is_said(model: Model) -> None:
    one = copy.deepcopy(model)
    one.lm_head.weight = torch.nn.Parameter(one.lm_head.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnreadableError, match="int8"):
        fingerprint(one)
    one.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"))
    with pytest.raises(UnreadableError, match="not in memory"):
        fingerprint(one)


def test_it_is_quick_and_reads_little(model: Model) -> None:
    """One of 300 tensors of 8 MB, which take a second to read, and one of many small ones."""
    large = torch.nn.Module()
    large.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.empty(1)) for _ in range(300))
    shared = torch.zeros(2048, 1024)
    for index in range(300):
        large.layers[index] = torch.nn.Parameter(shared[: 2048 - index])
    one = copy.deepcopy(model)
    for module in (large, one):
        began = time.process_time()
        fingerprint(module)
        assert time.process_time() - began < 0.2

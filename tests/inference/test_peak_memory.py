"""Peak memory of a prefill, counted: every tensor that an operator returns, from its making to the end of its storage.

The bar is for methods that need no budget across layers: beside what a forward without any cache needs, a prefill holds
what it has stored and at most the full keys and values of one layer.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.builders import cross_layer_capsule
from support.run_vlm import Model
from transformers import BatchFeature, DynamicCache, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.eval.bench.peak_memory import LiveBytes
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import EvenlySpaced, Full, Quantized
from kvcapsule.vlm.geometry import KVGeometry

LAYERS = 12
"""Enough that the keys and values of all layers are far more than one layer's."""


@pytest.fixture(scope="module")
def deep(model: Model) -> LlavaForConditionalGeneration:
    """A model of many layers with little beside their keys and values."""
    config = copy.deepcopy(model.config)
    config.text_config.num_hidden_layers, config.text_config.intermediate_size = LAYERS, 32
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., BatchFeature]) -> BatchFeature:
    return make_batch((3, "Read line 2."), (3, "Which of them?"))


class Peak(NamedTuple):
    most: int
    """Of a forward's decoder, in bytes beside what was there when it began."""
    stored: int
    """In the cache at its end."""


def peak(model: Any, batch: BatchFeature, cache: Any) -> Peak:
    began = []

    def begin(*args: Any) -> None:
        meter.peak = meter.live
        began.append(meter.live)

    handle = model.get_decoder().register_forward_pre_hook(begin)
    try:
        with torch.no_grad(), attach(model), LiveBytes() as meter:
            model(**batch, **cache_argument(cache), use_cache=cache is not None, logits_to_keep=1)
    finally:
        handle.remove()
    return Peak(meter.peak - began[0], cache.bytes().total if isinstance(cache, CapsuleCache) else 0)


def one_layer(batch: BatchFeature) -> int:
    """Keys and values of a layer: 2 KV heads of 32, float32."""
    return int(batch["input_ids"].numel()) * 2 * 2 * 32 * 4


@pytest.fixture(scope="module")
def bare(deep: Any, batch: BatchFeature) -> int:
    """The peak of a forward without a cache."""
    return peak(deep, batch, None).most


def capsule(model: Any) -> Capsule:
    ratios = ((0.1,) * LAYERS,) * 2
    return Capsule(
        CapsuleConfig("kvcapsule", KVCapsuleConfig(49, True, *ratios), KVGeometry.from_config(model.config), "tiny")
    )


METHODS: dict[str, Callable[[Any], Method]] = {
    "spaced": lambda model: EvenlySpaced(0.1),
    "quantized": lambda model: Quantized(2),
    "kvcapsule": capsule,
    "full": lambda model: Full(),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_is_compressed_before_the_next_one_runs(name: str, deep: Any, batch: BatchFeature, bare: int) -> None:
    most, stored = peak(deep, batch, CapsuleCache(deep.config, METHODS[name](deep)))
    assert most <= bare + stored + one_layer(batch)


def test_of_a_stack_of_layers_its_sum_waits(deep: Any, batch: BatchFeature, bare: int) -> None:
    """Beside what is held of one layer: of six images of 196 tokens, 20 numbers of float32 a token and KV head."""
    method = cross_layer_capsule(KVGeometry.from_config(deep.config), 49, joint_layers=4)
    most, stored = peak(deep, batch, CapsuleCache(deep.config, method))
    assert most <= bare + stored + one_layer(batch) + 6 * 196 * 2 * 20 * 4


def test_the_measure_sees_what_is_held(deep: Any, batch: BatchFeature, bare: int) -> None:
    """The bound could fail: a DynamicCache holds all, and so does a CapsuleCache whose compression waits or whose
    method hoards."""

    class Hoarding(EvenlySpaced):
        def __init__(self) -> None:
            super().__init__(0.1)
            self.hoard: list[torch.Tensor] = []

        def compress(self, prefill: LayerPrefill) -> Compressed:
            self.hoard += [prefill.keys, prefill.values]
            return super().compress(prefill)

    bound = bare + one_layer(batch)
    assert peak(deep, batch, DynamicCache(config=deep.config)).most > bound + (LAYERS - 3) * one_layer(batch)
    waiting = CapsuleCache(deep.config, EvenlySpaced(0.1))
    waiting.activate_past_recording()
    for cache in (CapsuleCache(deep.config, Hoarding()), waiting):
        most, _ = peak(deep, batch, cache)
        stored = peak(deep, batch, CapsuleCache(deep.config, EvenlySpaced(0.1))).stored
        assert most > bound + stored + (LAYERS // 2) * one_layer(batch)

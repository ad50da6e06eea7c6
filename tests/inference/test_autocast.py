"""Under torch.autocast every method runs, and one that keeps everything gives the tokens of the model's own cache."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import EVERY_FAMILY
from support.run_vlm import run
from support.tiny_llava import llava
from support.tiny_vlm import batch, build
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method
from kvcapsule.policy import POLICIES, Full, Quantized
from kvcapsule.vlm.geometry import KVGeometry

TINY = llava()


def of_half_the_tokens(name: str) -> Method:
    policy: Any = POLICIES[name]
    if name == "quantized":
        return Quantized(4)
    kept = {} if policy.budget_field is None else {policy.budget_field: 0.5}
    method: Method = policy(**kept)
    return method


METHODS: dict[str, Callable[[KVGeometry], Method]] = {
    **EVERY_FAMILY,
    **{name: (lambda _, name=name: of_half_the_tokens(name)) for name in POLICIES},
}
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llava", TINY)


@pytest.fixture(scope="module")
def prompt() -> BatchFeature:
    return batch(TINY, [20, 21, TINY.picture(0), 22], [23, TINY.picture(1), 24, 25, 26])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_runs(name: str, dtype: torch.dtype, model: PreTrainedModel, prompt: BatchFeature) -> None:
    """What is stored is of autocast's precision, as for a model of that precision."""
    cache = CapsuleCache(model.config, METHODS[name](KVGeometry.from_config(model.config)))
    with attach(model), torch.autocast("cpu", dtype):
        model.generate(**prompt, **cache_argument(cache), **OPTIONS)
    for layer in cache.capsule_layers():
        assert (layer.tail.keys.dtype, layer.tail.values.dtype) == (dtype, dtype)
        for segment in (*layer.visual, *layer.text):
            keys, values = segment.materialize()
            assert bool(keys.isfinite().all())
            assert bool(values.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tokens_of_the_models_own_cache(dtype: torch.dtype, model: PreTrainedModel, prompt: BatchFeature) -> None:
    with torch.autocast("cpu", dtype):
        expected = model.generate(**prompt, **OPTIONS)
        assert torch.equal(run(model, Full(), prompt, **OPTIONS), expected)

"""Models whose weights are quantised, loaded as their users load them: the cache is no different for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, Model, assert_same, run
from transformers import AutoModelForImageTextToText, BatchFeature, BitsAndBytesConfig

from kvcapsule import Capsule
from kvcapsule.inference.transformers_api import output_cache
from kvcapsule.policy import Full

OWN = ["vision_tower", "multi_modal_projector", "lm_head"]
"""Modules that stay as they are."""
CONFIG = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=OWN)


@pytest.fixture(scope="module")
def quantized(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder, quantization_config=CONFIG, dtype=torch.float32)
    kept = model.model.language_model.layers[0].self_attn.k_proj.weight
    assert type(loaded.model.language_model.layers[0].self_attn.k_proj.weight) is not type(kept), (
        "nothing was quantised"
    )
    return loaded


def test_the_full_cache_token_for_token(quantized: Any, make_batch: Callable[..., BatchFeature]) -> None:
    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."))
    options = {
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    assert_same(run(quantized, Full(), batch, **options), quantized.generate(**batch, **options), EXACT)


def test_a_capsule_stores_less(
    quantized: Any, random_transform: Callable[..., Capsule], make_batch: Callable[..., BatchFeature]
) -> None:
    out = run(
        quantized,
        random_transform(49, (16, 12), (24, 20)),
        make_batch((1, "Read line 2.")),
        do_sample=False,
        max_new_tokens=2,
        return_dict_in_generate=True,
    )
    held = output_cache(out).bytes()
    assert 0 < held.visual < 4 * 2 * 2 * 196 * 32 * 4 / 10

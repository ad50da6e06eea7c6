"""Positions of a model with M-RoPE are those of the cache that goes on, whatever prompt the model saw last."""

import copy
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.run_vlm import EXACT
from support.tiny_qwen import glm4v, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from support.tiny_vlm import batch, build
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import Full

FAMILIES = {"qwen2_vl": qwen2_vl, "qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl, "qwen3_5": qwen3_5, "glm4v": glm4v}
FIRST, OTHER, QUESTION = [20, 21], [30], [40, 41, 42]


class Case(NamedTuple):
    model: PreTrainedModel
    first: BatchFeature
    """A prompt with an image of one grid."""
    other: BatchFeature
    """A prompt with an image of another grid, in a conversation of its own."""
    text: BatchFeature
    """A prompt without an image."""
    both: BatchFeature
    """The first prompt and another as two rows."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    tiny = FAMILIES[request.param]()
    first, other = [*FIRST, tiny.picture(0), 22], [*OTHER, tiny.picture(1), 31]
    return Case(
        build(request.param, tiny),
        batch(tiny, first),
        batch(tiny, other),
        batch(tiny, [33, 34, 35, 36, 37]),
        # Of equal lengths: a direct forward of these models takes no mask over what is cached.
        batch(
            tiny,
            first,
            [*other[:1], *range(40, 40 + tiny.picture(0).spans[0] - tiny.picture(1).spans[0] + 1), *other[1:]],
        ),
    )


@pytest.fixture
def attached(case: Case) -> Iterator[PreTrainedModel]:
    with attach(case.model):
        yield case.model


def read(model: PreTrainedModel, inputs: BatchFeature) -> CapsuleCache:
    cache = CapsuleCache(model.config, Full())
    with torch.no_grad():
        model(**inputs, **cache_argument(cache))
    return cache


def ask(model: PreTrainedModel, cache: CapsuleCache, rows: int = 1) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([QUESTION] * rows), **cache_argument(cache)).logits
    return out


def generated(model: PreTrainedModel, inputs: BatchFeature, cache: CapsuleCache) -> torch.Tensor:
    """Logits of the answer to a question behind a prompt that the cache holds."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([QUESTION])], dim=1)
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    out: Any = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), **cache_argument(copy.deepcopy(cache)), **options
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("between", ["other", "text"])
def test_another_prompt_in_between(between: str, attached: PreTrainedModel, case: Case) -> None:
    cache = read(attached, case.first)
    expected = ask(attached, copy.deepcopy(cache))
    told = generated(attached, case.first, cache)
    read(attached, getattr(case, between))
    torch.testing.assert_close(ask(attached, copy.deepcopy(cache)), expected, rtol=0, atol=EXACT)
    read(attached, getattr(case, between))
    torch.testing.assert_close(generated(attached, case.first, cache), told, rtol=0, atol=EXACT)


def test_text_behind_another_image(attached: PreTrainedModel, case: Case) -> None:
    """A prompt of text alone, read after an image, is positioned from its own beginning."""
    for module in attached.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    cache = read(attached, case.text)
    expected = ask(attached, cache)
    read(attached, case.first)
    torch.testing.assert_close(ask(attached, read(attached, case.text)), expected, rtol=0, atol=EXACT)


def test_a_row_of_a_batch(attached: PreTrainedModel, case: Case) -> None:
    """Rows have deltas of their own, which go with them."""
    if case.model.config.model_type == "qwen3_5":
        pytest.skip("transformers' linear-attention layers choose no rows")
    assert bool(case.both["attention_mask"].all())
    batched = ask(attached, read(attached, case.both), rows=2)
    for row in range(2):
        cache = read(attached, case.both)
        cache.batch_select_indices(torch.tensor([row]))
        torch.testing.assert_close(ask(attached, cache), batched[row : row + 1], rtol=0, atol=EXACT)


def test_deltas_are_the_models_own(attached: PreTrainedModel, case: Case) -> None:
    """generate hands over positions; the deltas that follow from them are those that the model computed."""
    cache = CapsuleCache(attached.config, Full())
    attached.generate(**case.both, **cache_argument(cache), max_new_tokens=2, do_sample=False)
    (own,) = {
        tuple(module.rope_deltas.flatten().tolist())
        for module in attached.modules()
        if getattr(module, "rope_deltas", None) is not None
    }
    assert cache.rope_deltas is not None
    assert tuple(cache.rope_deltas.flatten().tolist()) == own
    assert len(set(own)) == 2, "the two images differ in their grids"


def test_another_thread_in_the_middle_of_a_forward(case: Case) -> None:
    """It reads another cache on the same model just before the positions of this one are computed."""
    (module,) = [module for module in case.model.modules() if "rope_deltas" in vars(module)]
    kind, here, seen = type(module), threading.get_ident(), list[torch.Tensor]()
    with attach(case.model):
        caches = [read(case.model, inputs) for inputs in (case.first, case.other)]
        expected = [ask(case.model, copy.deepcopy(cache)) for cache in caches]

        def of_other_thread() -> None:
            with attach(case.model):
                seen.append(ask(case.model, copy.deepcopy(caches[1])))

        def before(*_: Any) -> None:
            if threading.get_ident() == here:
                thread = threading.Thread(target=of_other_thread)
                thread.start()
                thread.join()

        handle = module.register_forward_pre_hook(before)
        try:
            seen.insert(0, ask(case.model, copy.deepcopy(caches[0])))
        finally:
            handle.remove()
        torch.testing.assert_close(seen, expected, rtol=0, atol=EXACT)
        copied = copy.deepcopy(module)
        copied.rope_deltas = None
        assert module.rope_deltas is not None
    assert type(module) is kind and module.rope_deltas is not None

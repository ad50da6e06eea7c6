"""A cache knows what it was given: prompts and masks that do not fit it are refused, never answered."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.builders import identity_capsule, transform_capsule
from support.run_vlm import EXACT
from support.tiny_llava import llava
from support.tiny_vlm import IMAGE, batch, build
from transformers import BatchFeature, DynamicCache, PreTrainedModel

from kvcapsule.errors import ConfigError, GeometryError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method
from kvcapsule.policy import Full
from kvcapsule.vlm.geometry import KVGeometry

TINY = llava()
SHORT: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build("llava", TINY)


@pytest.fixture
def attached(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    with attach(model):
        yield model


@pytest.fixture(scope="module")
def prompt() -> BatchFeature:
    return batch(TINY, [20, 21, TINY.picture(0), 22, 23, 24])


@pytest.fixture
def read(attached: PreTrainedModel, prompt: BatchFeature) -> CapsuleCache:
    """A cache of the prompt and an answer."""
    cache = CapsuleCache(attached.config, Full())
    attached.generate(**prompt, **cache_argument(cache), **SHORT)
    return cache


def forward(model: PreTrainedModel, cache: Any, tokens: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.tensor([tokens]), attention_mask=mask, **cache_argument(cache)).logits
    return out


class TestPromptBehindACache:
    def answer(self, model: PreTrainedModel, cache: CapsuleCache, ids: torch.Tensor, **options: Any) -> None:
        model.generate(input_ids=ids, **cache_argument(cache), **{**SHORT, **options})

    def test_goes_on(self, attached: PreTrainedModel, prompt: BatchFeature, read: CapsuleCache) -> None:
        """The prompt, the answer (whose last token is not cached) and a question."""
        answered = attached.generate(**prompt, **SHORT)
        ids = torch.cat([answered, torch.tensor([[30, 31]])], dim=1)
        self.answer(attached, copy.deepcopy(read), ids, attention_mask=torch.ones_like(ids))
        held = int(read.get_seq_length())
        mask = torch.ones(1, ids.shape[1], dtype=torch.int64)
        self.answer(attached, read, ids[:, held:], attention_mask=mask)

    def test_of_another_conversation(self, attached: PreTrainedModel, prompt: BatchFeature, read: CapsuleCache) -> None:
        ids = torch.cat([prompt["input_ids"], torch.full((1, 8), 30)], dim=1)
        ids[0, 1] = 29
        with pytest.raises(ConfigError, match="token 1 of row 0 is 29, and the cache holds 21 there"):
            self.answer(attached, read, ids, attention_mask=torch.ones_like(ids))

    def test_with_fewer_tokens(self, attached: PreTrainedModel, prompt: BatchFeature, read: CapsuleCache) -> None:
        with pytest.raises(ConfigError, match="the prompt has 23 tokens, and the cache holds 25 already"):
            self.answer(attached, read, prompt["input_ids"], attention_mask=prompt["attention_mask"])

    def test_with_a_mask_of_another_length(self, attached: PreTrainedModel, read: CapsuleCache) -> None:
        ids = torch.tensor([[30, 31]])
        with pytest.raises(ConfigError, match="mask is of 30 tokens, of which 2 are given, but the cache holds 25"):
            self.answer(attached, read, ids, attention_mask=torch.ones(1, 30, dtype=torch.int64))

    def test_after_tokens_were_taken_back(
        self, attached: PreTrainedModel, prompt: BatchFeature, read: CapsuleCache
    ) -> None:
        """What stands in their place may differ."""
        read.crop(-2)
        ids = torch.cat([prompt["input_ids"], torch.tensor([[50, 51, 52]])], dim=1)
        self.answer(attached, read, ids, attention_mask=torch.ones_like(ids))

    def test_of_a_chosen_row(self, attached: PreTrainedModel) -> None:
        cache = CapsuleCache(attached.config, Full())
        rows = batch(TINY, [20, TINY.picture(0), 22], [21, TINY.picture(1), 23])
        with torch.no_grad():
            attached(**rows, **cache_argument(cache))
        cache.batch_select_indices(torch.tensor([1]))
        ids = torch.cat([rows["input_ids"], torch.tensor([[30], [30]])], dim=1)
        with pytest.raises(ConfigError, match="token 0 of row 0 is 20, and the cache holds 21"):
            self.answer(attached, cache, ids[:1], attention_mask=torch.ones_like(ids[:1]))
        self.answer(attached, cache, ids[1:], attention_mask=torch.ones_like(ids[1:]))


@pytest.mark.parametrize("method", [Full(), "capsule"], ids=["full", "transform"])
def test_a_forward_that_breaks_off(
    method: Method | str, attached: PreTrainedModel, prompt: BatchFeature, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first layer or before it nothing was written, and the cache goes on; later it is refused."""
    if isinstance(method, str):
        method = transform_capsule(KVGeometry.from_config(attached.config))
    cache = CapsuleCache(attached.config, method)
    with torch.no_grad():
        attached(**prompt, **cache_argument(cache))
    expected = forward(attached, copy.deepcopy(cache), [30, 31])
    layers = attached.get_decoder().layers

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    for broken in (0, 1):
        monkeypatch.setattr(layers[broken], "forward", fail)
        with pytest.raises(MemoryError):
            forward(attached, cache, [30, 31])
        monkeypatch.undo()
        if broken == 0:
            torch.testing.assert_close(forward(attached, copy.deepcopy(cache), [30, 31]), expected, rtol=0, atol=0)
            cache.batch_select_indices(torch.tensor([0]))
    for _ in range(2):
        with pytest.raises(ConfigError, match="broke off half-way"):
            forward(attached, cache, [30, 31])
    with pytest.raises(ConfigError, match="broke off half-way"):
        cache.crop(-1)
    with pytest.raises(ConfigError, match="broke off half-way"):
        cache.batch_select_indices(torch.tensor([0]))
    cache.reset()
    with torch.no_grad():
        attached(**prompt, **cache_argument(cache))
    torch.testing.assert_close(forward(attached, cache, [30, 31]), expected, rtol=0, atol=0)


class TestMasks:
    def test_hidden_visual_tokens(self, attached: PreTrainedModel, prompt: BatchFeature) -> None:
        """They are not seen by later tokens, as with the model's own cache."""
        mask = prompt["attention_mask"].clone()
        mask[0, 5:9] = 0
        logits = []
        geometry = KVGeometry.from_config(attached.config)
        for cache in (DynamicCache(config=attached.config), CapsuleCache(attached.config, identity_capsule(geometry))):
            with torch.no_grad():
                attached(**{**prompt, "attention_mask": mask}, **cache_argument(cache))
            logits.append(forward(attached, cache, [30, 31], torch.cat([mask, torch.ones(1, 2).long()], dim=1)))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=EXACT)
        plain = CapsuleCache(attached.config, Full())
        with torch.no_grad():
            attached(**prompt, **cache_argument(plain))
        assert (forward(attached, plain, [30, 31]) - logits[0]).abs().max() > 0.1, "the mask matters"

    @pytest.mark.parametrize("place", [0, 10])
    @pytest.mark.parametrize("tokens", [[30], [30, 31]], ids=["a step", "a turn"])
    def test_over_what_is_stored(
        self, place: int, tokens: list[int], attached: PreTrainedModel, prompt: BatchFeature
    ) -> None:
        cache = CapsuleCache(attached.config, Full())
        with torch.no_grad():
            attached(**prompt, **cache_argument(cache))
        mask = torch.ones(1, prompt["input_ids"].shape[1] + len(tokens), dtype=torch.int64)
        forward(attached, copy.deepcopy(cache), tokens, mask)
        mask[0, place] = 0
        with pytest.raises(ConfigError, match=f"the attention mask of row 0 differs at token {place}"):
            forward(attached, cache, tokens, mask)
        wide = mask[:, None, None].bool().expand(1, 1, len(tokens), -1)
        with pytest.raises(ConfigError, match=f"the attention mask of row 0 differs at token {place}"):
            forward(attached, cache, tokens, wide)

    def test_of_chosen_rows(self, attached: PreTrainedModel) -> None:
        cache = CapsuleCache(attached.config, Full())
        rows = batch(TINY, [20, 21, 22, TINY.picture(0), 22], [21, TINY.picture(1), 23])
        with torch.no_grad():
            attached(**rows, **cache_argument(cache))
        cache.batch_select_indices(torch.tensor([1, 0]))
        mask = torch.cat([rows["attention_mask"].flip(0), torch.ones(2, 1).long()], dim=1)
        with torch.no_grad():
            attached(input_ids=torch.tensor([[30], [30]]), attention_mask=mask, **cache_argument(cache))
        mask = torch.cat([rows["attention_mask"], torch.ones(2, 2).long()], dim=1)
        with pytest.raises(ConfigError, match="row 0 differs at token 0"), torch.no_grad():
            attached(input_ids=torch.tensor([[30], [30]]), attention_mask=mask, **cache_argument(cache))


def test_the_mask_of_tokens_that_were_taken_back(attached: PreTrainedModel, prompt: BatchFeature) -> None:
    """It says nothing of what stands in their place, an image here."""
    cache, later = CapsuleCache(attached.config, Full()), batch(TINY, [25, TINY.picture(1), 26])
    with torch.no_grad():
        attached(**prompt, **cache_argument(cache))
        read, new = prompt["input_ids"].shape[1], later["input_ids"].shape[1]
        mask = torch.ones(1, read + 3, dtype=torch.int64)
        mask[0, read] = 0
        forward(attached, cache, [30, 31, 32], mask)
        cache.crop(-3)
        attached(**{**later, "attention_mask": None}, **cache_argument(cache))
    forward(attached, cache, [33], torch.ones(1, read + new + 1, dtype=torch.int64))
    assert cache.get_seq_length() == read + new + 1


def test_placeholders_without_pictures_are_text(attached: PreTrainedModel, prompt: BatchFeature) -> None:
    """A draft may propose any token; what no image belongs to is compressed as no image."""
    geometry = KVGeometry.from_config(attached.config)
    logits = []
    for cache in (DynamicCache(config=attached.config), CapsuleCache(attached.config, transform_capsule(geometry))):
        with torch.no_grad():
            attached(**prompt, **cache_argument(cache))
        if isinstance(cache, CapsuleCache):
            before = cache.bytes().visual
            cache.activate_past_recording()  # type: ignore[no-untyped-call]
        logits.append(forward(attached, cache, [30, *[IMAGE] * 16, 31]))
    assert isinstance(cache, CapsuleCache)
    assert cache.bytes().visual == before
    cache.crop(-3)
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 15


def test_geometry_of_a_cache_made_by_hand(model: PreTrainedModel) -> None:
    geometry = KVGeometry.from_config(model.config)
    other = KVGeometry(geometry.model_type, geometry.layers, 4, 4, geometry.head_dim, geometry.rotary)
    with pytest.raises(GeometryError, match="kv_heads: 4 != 2"):
        CapsuleCache(model.config, transform_capsule(other))

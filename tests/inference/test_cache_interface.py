"""What transformers, or a user, asks of a cache."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, assert_same, longer, prefill, step
from transformers import BatchFeature, DynamicCache, Gemma3nConfig, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import GeometryError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.methods.method import Method
from kvcapsule.policy import Full, PostVisionAttention, Quantized

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration


class TestCacheInterface:
    """What transformers, or a user, asks of a cache."""

    @pytest.fixture
    def attached(self, model: Model) -> Iterator[Model]:
        with attach(model):
            yield model

    def test_direct_forward(self, attached: Model, mixed: BatchFeature, keeper: Method) -> None:
        own, cache = DynamicCache(config=attached.config), CapsuleCache(attached.config, keeper)
        torch.testing.assert_close(prefill(attached, mixed, cache), prefill(attached, mixed, own), rtol=0, atol=0)
        mask = mixed["attention_mask"]
        for tokens in (torch.tensor([[40], [41], [42]]), torch.tensor([[43, 44, 45]] * 3), torch.tensor([[46]] * 3)):
            mask = longer(mask, tokens.shape[1])
            torch.testing.assert_close(
                step(attached, cache, tokens, mask), step(attached, own, tokens, mask), rtol=0, atol=EXACT
            )

    def test_one_token_prompt(self, attached: Model) -> None:
        own, cache = DynamicCache(config=attached.config), CapsuleCache(attached.config, Full())
        for i in range(3):
            tokens, mask = torch.tensor([[40 + i]]), torch.ones(1, i + 1, dtype=torch.int64)
            torch.testing.assert_close(
                step(attached, cache, tokens, mask), step(attached, own, tokens, mask), rtol=0, atol=EXACT
            )

    @pytest.mark.parametrize("method", [PostVisionAttention(0.1), Quantized(2), Full()], ids=lambda m: type(m).__name__)
    def test_length_is_logical(self, method: Method, attached: Model, mixed: BatchFeature) -> None:
        cache, length = CapsuleCache(attached.config, method), mixed["input_ids"].shape[1]
        assert cache.get_seq_length() == 0
        prefill(attached, mixed, cache)
        assert cache.get_seq_length() == length
        step(attached, cache, torch.full((3, 2), 50), longer(mixed["attention_mask"], 2))
        assert [cache.get_seq_length(i) for i in range(4)] == [length + 2] * 4
        assert cache.get_mask_sizes(5, 0) == (7, length), "a mask of the tail alone"
        assert cache.get_max_length() == -1

    def test_tail_grows_past_its_first_buffer(self, attached: Model, make_batch: Batch) -> None:
        batch = make_batch((1, "Read line 2."))
        own, cache = DynamicCache(config=attached.config), CapsuleCache(attached.config, Full())
        tokens = torch.randint(20, 60, (1, 150), generator=torch.Generator().manual_seed(0))
        logits = []
        for past in (own, cache):
            prefill(attached, batch, past)
            mask = batch["attention_mask"]
            for part in tokens.split([1, 62, 1, 1, 80, 5], dim=1):
                mask = longer(mask, part.shape[1])
                last = step(attached, past, part, mask)
            logits.append(last)
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=EXACT)
        assert cache.bytes().tail < 4 * 2 * 2 * 32 * 4 * 2 * 150
        own_bytes = sum(t.nbytes for layer in own.layers for t in (layer.keys, layer.values))
        assert cache.full_bytes() == own_bytes

    def test_crop_within_the_tail(self, attached: Model, mixed: BatchFeature) -> None:
        cache, mask = CapsuleCache(attached.config, Full()), mixed["attention_mask"]
        prefill(attached, mixed, cache)
        tokens = torch.randint(20, 60, (3, 5), generator=torch.Generator().manual_seed(0))
        expected = step(attached, cache, tokens, longer(mask, 5))
        cache.crop(-3)
        assert cache.get_seq_length() == mask.shape[1] + 2
        step(attached, cache, tokens[:, :1] + 1, longer(mask, 3))
        cache.crop(-1)
        again = step(attached, cache, tokens[:, 2:], longer(mask, 5))
        torch.testing.assert_close(again, expected[:, 2:], rtol=0, atol=EXACT)
        cache.crop(0)
        assert cache.get_seq_length() == mask.shape[1] + 5

    def test_crop_into_the_prompt_is_refused(self, attached: Model, mixed: BatchFeature) -> None:
        cache, mask = CapsuleCache(attached.config, Full()), mixed["attention_mask"]
        prefill(attached, mixed, cache)
        step(attached, cache, torch.full((3, 2), 50), longer(mask, 2))
        with pytest.raises(ValueError, match="cannot remove 3 tokens: only the 2 written since"):
            cache.crop(-3)
        with pytest.raises(ValueError, match="negative"):
            cache.crop(10)
        assert [cache.get_seq_length(i) for i in range(4)] == [mask.shape[1] + 2] * 4

    def test_reset(
        self, attached: Model, mixed: BatchFeature, make_batch: Batch, greedy: dict[str, Any], expected: Any
    ) -> None:
        cache = CapsuleCache(attached.config, Full())
        attached.generate(**make_batch((1, "Hello.")), **cache_argument(cache), **greedy)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.bytes().total == cache.full_bytes() == 0
        assert_same(attached.generate(**mixed, **cache_argument(cache), **greedy), expected)

    @pytest.mark.parametrize("method", ["full", "kvcapsule", "quantized", "transform"])
    def test_rows_repeated_and_chosen(
        self,
        method: str,
        attached: Model,
        mixed: BatchFeature,
        random_capsule: Callable[..., Capsule],
        random_transform: Callable[..., Capsule],
    ) -> None:
        methods = {
            "full": Full(),
            "kvcapsule": random_capsule(),
            "quantized": Quantized(4),
            "transform": random_transform(),
        }
        cache = CapsuleCache(attached.config, methods[method])
        prefill(attached, mixed, cache)
        mask = longer(mixed["attention_mask"], 1)
        plain = step(attached, cache, torch.tensor([[40], [41], [42]]), mask)
        cache.crop(-1)
        cache.batch_repeat_interleave(2)
        rows = [0, 0, 1, 1, 2, 2]
        repeated = step(attached, cache, torch.tensor([[40], [40], [41], [41], [42], [42]]), mask[rows])
        torch.testing.assert_close(repeated, plain[rows], rtol=0, atol=EXACT)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([5, 2]))
        torch.testing.assert_close(
            step(attached, cache, torch.tensor([[42], [41]]), mask[[2, 1]]), plain[[2, 1]], rtol=0, atol=EXACT
        )
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([False, True]))
        torch.testing.assert_close(
            step(attached, cache, torch.tensor([[41]]), mask[[1]]), plain[[1]], rtol=0, atol=EXACT
        )

    def test_reordering_before_anything_is_stored(self, attached: Model) -> None:
        cache = CapsuleCache(attached.config, Full())
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.get_seq_length() == 0

    def test_embeddings_alone_are_refused(self, attached: Model) -> None:
        with pytest.raises(ValueError, match="pass input_ids"):
            attached(inputs_embeds=torch.zeros(1, 4, 128), **cache_argument(CapsuleCache(attached.config, Full())))

    def test_layers_that_share_keys_are_refused(self) -> None:
        with pytest.raises(GeometryError, match="gemma3n: its last 15 layers"):
            CapsuleCache(Gemma3nConfig(), Full())

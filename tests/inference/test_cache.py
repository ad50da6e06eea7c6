"""What a model does with a CapsuleCache is what it does with its own cache, where a method loses nothing."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from support.run_vlm import (
    EXACT,
    MIXED,
    assert_same,
    in_dtype,
    longer,
    prefill,
    ready,
    run,
    step,
    tiny_gemma,
    tiny_qwen,
)
from transformers import BatchFeature, DynamicCache, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache, CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument, output_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention
from kvcapsule.vlm.geometry import KVGeometry

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration


@pytest.fixture(scope="module")
def expected64(model64: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> Any:
    return model64.generate(**in_dtype(mixed, torch.float64), **greedy)


class TestEverythingKept:
    """Methods that lose nothing give the full cache's tokens and logits."""

    def test_the_answers_tell_something(
        self, expected: Any, model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        """The rows differ, and so would the answer without the image's KV: the tests below could fail."""
        assert len({tuple(row.tolist()) for row in expected.sequences[:, -8:]}) == 3
        one = make_batch((1, MIXED[0][1]))
        with pytest.raises(AssertionError):
            assert_same(
                run(model, PostVisionAttention(0.01), one, **greedy), model.generate(**one, **greedy), atol=1e-2
            )

    def test_greedy_batch(
        self, keeper: Method, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        assert_same(run(model, keeper, mixed, **greedy), expected)

    def test_in_double_precision(
        self, keeper: Method, model64: Model, mixed: BatchFeature, greedy: dict[str, Any], expected64: Any
    ) -> None:
        """Logits come in float32 all the same."""
        assert_same(run(model64, keeper, in_dtype(mixed, torch.float64), **greedy), expected64, atol=1e-6)

    def test_cache_given_by_hand(
        self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        with attach(model):
            cache = CapsuleCache(model.config, Full())
            out = model.generate(**mixed, **cache_argument(cache), **greedy)
        assert_same(out, expected)
        assert output_cache(out) is cache
        assert cache.get_seq_length() == expected.sequences.shape[1] - 1
        assert all(isinstance(layer, CapsuleLayer) and layer.tail_length == 7 for layer in cache.layers)

    @pytest.mark.parametrize("keeper", ["full", "tile 49"], indirect=True)
    def test_prompt_without_image(
        self, keeper: Method, model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        batch = make_batch((0, "Hello."), (0, "What is the number beside the owl?"))
        out = run(model, keeper, batch, **greedy)
        assert_same(out, model.generate(**batch, **greedy))
        assert output_cache(out).bytes().visual == 0

    def test_sampling(
        self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], identity: Callable[..., Capsule]
    ) -> None:
        options = {**greedy, "do_sample": True, "temperature": 0.9, "top_k": 40}
        torch.manual_seed(3)
        expected = model.generate(**mixed, **options)
        torch.manual_seed(3)
        assert_same(run(model, identity(50), mixed, **options), expected)
        torch.manual_seed(4)
        assert not torch.equal(model.generate(**mixed, **options).sequences, expected.sequences)

    @pytest.mark.parametrize("returned", [1, 3])
    def test_beams(
        self, returned: int, model: Model, make_batch: Batch, greedy: dict[str, Any], identity: Callable[..., Capsule]
    ) -> None:
        batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
        options = {**greedy, "num_beams": 3, "num_return_sequences": returned, "output_scores": True}
        expected = model.generate(**batch, **options)
        assert expected.beam_indices.unique().numel() > 3
        out = run(model, identity(50), batch, **options)
        assert_same(out, expected)
        torch.testing.assert_close(out.sequences_scores, expected.sequences_scores)

    def test_several_sequences_of_one_prompt(self, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        batch = make_batch((1, "Read line 2."), (0, "Hello."))
        options = {**greedy, "do_sample": True, "num_return_sequences": 2}
        torch.manual_seed(5)
        expected = model.generate(**batch, **options)
        torch.manual_seed(5)
        assert_same(run(model, Full(), batch, **options), expected)

    def test_candidate_tokens_that_are_taken_back(
        self, model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        """Prompt lookup feeds several tokens at once and crops those that were wrong."""
        batch = make_batch((1, "Transcribe the page. Transcribe the page."))
        options = {**greedy, "prompt_lookup_num_tokens": 3, "max_new_tokens": 20, "min_new_tokens": 20}
        out = run(model, Full(), batch, **options)
        assert torch.equal(out.sequences, model.generate(**batch, **options).sequences)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(
        self, dtype: torch.dtype, model: Model, make_batch: Batch, identity: Callable[..., Capsule]
    ) -> None:
        half = copy.deepcopy(model).to(dtype)
        batch = in_dtype(make_batch((1, "Read line 2.")), dtype)
        token, mask = torch.full((1, 1), 50), longer(batch["attention_mask"], 1)
        own = DynamicCache(config=half.config)
        prefill(half, batch, own)
        expected = step(half, own, token, mask)
        with attach(half):
            cache = CapsuleCache(half.config, identity(50))
            prefill(half, batch, cache)
            logits = step(half, cache, token, mask)
        assert logits.dtype == dtype
        assert all(segment.keys.dtype == dtype for layer in cache.layers for segment in layer.visual)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0.15 if dtype == torch.bfloat16 else 0.02)


def converse(
    model: Model,
    first: BatchFeature,
    second: list[str],
    cache: Any,
    greedy: dict[str, Any],
    processor: Any,
    pixels: Any,
) -> Any:
    """Both turns' outputs; the second is given the whole conversation, as a chat would."""
    out = model.generate(**first, **cache_argument(cache), **greedy)
    asked = processor.tokenizer(second, padding=True, return_tensors="pt")
    ids = torch.cat([out.sequences, asked["input_ids"]], dim=1)
    mask = torch.cat([longer(first["attention_mask"], greedy["max_new_tokens"]), asked["attention_mask"]], dim=1)
    images = {} if pixels is None else {"pixel_values": pixels}
    return out, model.generate(input_ids=ids, attention_mask=mask, **cache_argument(cache), **images, **greedy)


PLACEHOLDERS = "<image>" * 196
SECOND = {
    "text": ["<|user|>And line 3?<|assistant|>", "<|user|>How many 7 are there in it?<|assistant|>"],
    "image in each": [
        f"<|user|>{PLACEHOLDERS}And here?<|assistant|>",
        f"<|user|>And in this one {PLACEHOLDERS}<|assistant|>",
    ],
    "image in one": [f"<|user|>{PLACEHOLDERS}And here?<|assistant|>", "<|user|>Line 3?<|assistant|>"],
}


@pytest.fixture(scope="module", params=[(turn, rows) for turn in SECOND for rows in (1, 2)], ids=str)
def conversation(
    request: pytest.FixtureRequest, model: Model, make_batch: Batch, greedy: dict[str, Any], processor: Any
) -> tuple[Callable[[Any], Any], Any]:
    """A conversation of two turns for any cache, and the outputs of the model's own."""
    turn, rows = request.param
    first = make_batch(*((1, "Read line 2."), (1, "What stands beside owl?"))[:rows])
    second = SECOND[turn][:rows]
    new = sum(text.count(PLACEHOLDERS) for text in second)
    pixels = make_batch((4, ""))["pixel_values"][-new:] if new else None

    def hold(cache: Any) -> Any:
        return converse(model, first, second, cache, greedy, processor, pixels)

    return hold, hold(DynamicCache(config=model.config))


class TestTurns:
    """A second turn over a compressed first."""

    @pytest.mark.parametrize(
        "keeper", ["full", "tile 50, the last one incomplete", "tile 49, no frames"], indirect=True
    )
    def test_second_turn(self, keeper: Method, conversation: tuple[Callable[[Any], Any], Any], model: Model) -> None:
        hold, own = conversation
        with attach(model):
            cache = CapsuleCache(model.config, keeper)
            for out, expected in zip(hold(cache), own, strict=True):
                assert_same(out, expected)
        assert cache.get_seq_length() == own[1].sequences.shape[1] - 1
        assert not torch.equal(own[0].sequences[:, -8:], own[1].sequences[:, -8:])

    def test_a_new_image_is_compressed(
        self, model: Model, make_batch: Batch, greedy: dict[str, Any], processor: Any
    ) -> None:
        first, pixels = make_batch((1, "Read line 2.")), make_batch((2, ""))["pixel_values"][1:]
        with attach(model):
            cache = CapsuleCache(model.config, EvenlySpaced(0.25))
            prefill(model, first, cache)
            before = cache.bytes()
            cache.reset()
            converse(model, first, SECOND["image in each"][:1], cache, greedy, processor, pixels)
        assert cache.bytes().visual == 2 * before.visual
        assert [len(layer.visual) for layer in cache.layers] == [2] * 4

    def test_four_turns_with_padding_in_each(
        self, model: Model, make_batch: Batch, identity: Callable[..., Capsule]
    ) -> None:
        """By direct forwards: what a turn with an image closes as text, padding in it, is read as before."""
        batches = [
            make_batch((1, "Read line 2."), (1, "What is the number beside the owl?")),
            make_batch((0, "Hello."), (0, "What is the number beside the cat?")),
            make_batch((1, "And in this one?"), (0, "Hello.")),
            make_batch((2, "Which of the two?"), (1, "Read line 2.")),
        ]
        own, logits = DynamicCache(config=model.config), []
        with attach(model):
            cache = CapsuleCache(model.config, identity(50))
            for past in (own, cache):
                mask = torch.ones(2, 0, dtype=torch.int64)
                for batch in batches:
                    length = batch["input_ids"].shape[1]
                    mask = torch.cat([mask, batch["attention_mask"]], dim=1)
                    positions = (mask.cumsum(1) - 1)[:, -length:]
                    call = {**batch, "attention_mask": mask, "position_ids": positions}
                    logits.append(prefill(model, BatchFeature(call), past)[batch["attention_mask"].bool()])
                    mask = longer(mask, 2)
                    logits.append(step(model, past, torch.tensor([[40, 41], [42, 43]]), mask))
        for ours, theirs in zip(logits[8:], logits[:8], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)


@pytest.fixture(scope="module", params=[tiny_qwen, tiny_gemma], ids=["qwen", "gemma"])
def family(request: pytest.FixtureRequest) -> tuple[Any, BatchFeature]:
    return ready(*request.param())


class TestOtherFamilies:
    """M-RoPE, and layers with a window between those with full attention."""

    OPTIONS: ClassVar[dict[str, Any]] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }

    @pytest.mark.parametrize("tile", [6, 7, 8])
    def test_everything_kept(self, tile: int, family: tuple[Any, BatchFeature]) -> None:
        built, batch = family
        config = CapsuleConfig("identity", IdentityConfig(tile), KVGeometry.from_config(built.config), "tiny")
        expected = built.generate(**batch, pad_token_id=0, **self.OPTIONS)
        assert_same(run(built, Capsule(config), batch, pad_token_id=0, **self.OPTIONS), expected)
        with pytest.raises(AssertionError):
            assert_same(run(built, EvenlySpaced(0.05), batch, pad_token_id=0, **self.OPTIONS), expected, atol=1e-3)

    def test_tiles_are_of_one_image_and_turn_back_as_the_model_turns(self, family: tuple[Any, BatchFeature]) -> None:
        """In generate as in a direct forward: equal tiles, and the rotation of full attention."""
        built, batch = family
        seen: list[LayerPrefill] = []

        class Witness(Full):
            def compress(self, prefill: LayerPrefill) -> Compressed:
                seen.append(prefill)
                return super().compress(prefill)

        with attach(built, Witness()):
            built.generate(**batch, pad_token_id=0, **self.OPTIONS)
            prefill(built, batch, CapsuleCache(built.config, Witness()))
        assert len(seen) == 4
        lengths = [24, 8] if "image_grid_thw" in batch else [16, 16]
        for of_layer in seen:
            assert [span.length for span in of_layer.spans] == lengths
            assert of_layer.position_embeddings is not None
            for ours, theirs in zip(of_layer.position_embeddings, seen[0].position_embeddings, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        if "token_type_ids" in batch:
            rope, positions = built.get_decoder().rotary_emb, torch.arange(batch["input_ids"].shape[1])[None]
            full, windowed = (rope(torch.zeros(1), positions, f"{kind}_attention") for kind in ("full", "sliding"))
            torch.testing.assert_close(seen[0].position_embeddings, full)
            assert not torch.allclose(full[0], windowed[0])

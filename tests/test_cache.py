"""What a model does with a CapsuleCache is what it does with its own cache, as far as a method promises."""

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from running import EXACT, MIXED, assert_same, in_dtype, longer, prefill, ready, run, step, tiny_gemma, tiny_qwen
from transformers import BatchFeature, DynamicCache, Gemma3nConfig, GenerationConfig, LlavaForConditionalGeneration, pipeline

from kvcapsule import attention
from kvcapsule.attention import IMPLEMENTATION
from kvcapsule.cache import CapsuleCache, CapsuleLayer
from kvcapsule.capsule import Capsule, CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.geometry import GeometryError, KVGeometry
from kvcapsule.inference import attach
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention, Quantized
from kvcapsule.prefill import Compressed, LayerPrefill, Method
from kvcapsule.segment import Segment

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration

EVERYTHING_KEPT = {
    "full": lambda identity: Full(),
    "tile 49": lambda identity: identity(49),
    "tile 50, the last one incomplete": lambda identity: identity(50),
    "tile 196": lambda identity: identity(196),
    "tile 300, larger than the image": lambda identity: identity(300),
    "tile 49, no frames": lambda identity: identity(49, canonical_frame=False),
    "all tokens, ranked": lambda identity: PostVisionAttention(1.0),
    "all tokens, spaced": lambda identity: EvenlySpaced(1.0),
}


@pytest.fixture(params=EVERYTHING_KEPT)
def keeper(request: pytest.FixtureRequest, identity: Callable[..., Capsule]) -> Method:
    """A method that loses nothing."""
    return EVERYTHING_KEPT[request.param](identity)


@pytest.fixture(scope="module")
def mixed(make_batch: Batch) -> BatchFeature:
    return make_batch(*MIXED)


@pytest.fixture(scope="module")
def expected(model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> Any:
    """The model's own greedy answer to the mixed batch."""
    return model.generate(**mixed, **greedy)


@pytest.fixture(scope="module")
def expected64(model64: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> Any:
    return model64.generate(**in_dtype(mixed, torch.float64), **greedy)


class TestEverythingKept:
    """Methods that lose nothing give the full cache's tokens and logits."""

    def test_the_answers_tell_something(self, expected: Any, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        """The rows differ, and so would the answer without the image's KV: the tests below could fail."""
        assert len({tuple(row.tolist()) for row in expected.sequences[:, -8:]}) == 3
        one = make_batch((1, MIXED[0][1]))
        with pytest.raises(AssertionError):
            assert_same(run(model, PostVisionAttention(0.01), one, **greedy), model.generate(**one, **greedy), atol=1e-2)

    def test_greedy_batch(self, keeper: Method, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
        assert_same(run(model, keeper, mixed, **greedy), expected)

    def test_in_double_precision(
        self, keeper: Method, model64: Model, mixed: BatchFeature, greedy: dict[str, Any], expected64: Any
    ) -> None:
        """Logits come in float32 all the same."""
        assert_same(run(model64, keeper, in_dtype(mixed, torch.float64), **greedy), expected64, atol=1e-6)

    def test_cache_given_by_hand(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
        with attach(model):
            cache = CapsuleCache(model.config, Full())
            out = model.generate(**mixed, past_key_values=cache, **greedy)
        assert_same(out, expected)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == expected.sequences.shape[1] - 1
        assert all(isinstance(layer, CapsuleLayer) and layer.tail_length == 7 for layer in cache.layers)

    @pytest.mark.parametrize("keeper", ["full", "tile 49"], indirect=True)
    def test_prompt_without_image(self, keeper: Method, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        batch = make_batch((0, "Hello."), (0, "What is the number beside the owl?"))
        out = run(model, keeper, batch, **greedy)
        assert_same(out, model.generate(**batch, **greedy))
        assert out.past_key_values.bytes().visual == 0

    def test_sampling(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], identity: Callable[..., Capsule]) -> None:
        options = {**greedy, "do_sample": True, "temperature": 0.9, "top_k": 40}
        torch.manual_seed(3)
        expected = model.generate(**mixed, **options)
        torch.manual_seed(3)
        assert_same(run(model, identity(50), mixed, **options), expected)
        torch.manual_seed(4)
        assert not torch.equal(model.generate(**mixed, **options).sequences, expected.sequences)

    @pytest.mark.parametrize("returned", [1, 3])
    def test_beams(self, returned: int, model: Model, make_batch: Batch, greedy: dict[str, Any], identity: Callable[..., Capsule]) -> None:
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

    def test_candidate_tokens_that_are_taken_back(self, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        """Prompt lookup feeds several tokens at once and crops those that were wrong."""
        batch = make_batch((1, "Transcribe the page. Transcribe the page."))
        options = {**greedy, "prompt_lookup_num_tokens": 3, "max_new_tokens": 20, "min_new_tokens": 20}
        out = run(model, Full(), batch, **options)
        assert torch.equal(out.sequences, model.generate(**batch, **options).sequences)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype: torch.dtype, model: Model, make_batch: Batch, identity: Callable[..., Capsule]) -> None:
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


def converse(model: Model, first: BatchFeature, second: list[str], cache: Any, greedy: dict[str, Any], processor: Any, pixels: Any) -> Any:
    """Both turns' outputs; the second is given the whole conversation, as a chat would."""
    out = model.generate(**first, past_key_values=cache, **greedy)
    asked = processor.tokenizer(second, padding=True, return_tensors="pt")
    ids = torch.cat([out.sequences, asked["input_ids"]], dim=1)
    mask = torch.cat([longer(first["attention_mask"], greedy["max_new_tokens"]), asked["attention_mask"]], dim=1)
    images = {} if pixels is None else {"pixel_values": pixels}
    return out, model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **images, **greedy)


PLACEHOLDERS = "<image>" * 196
SECOND = {
    "text": ["<|user|>And line 3?<|assistant|>", "<|user|>How many 7 are there in it?<|assistant|>"],
    "image in each": [f"<|user|>{PLACEHOLDERS}And here?<|assistant|>", f"<|user|>And in this one {PLACEHOLDERS}<|assistant|>"],
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

    @pytest.mark.parametrize("keeper", ["full", "tile 50, the last one incomplete", "tile 49, no frames"], indirect=True)
    def test_second_turn(self, keeper: Method, conversation: tuple[Callable[[Any], Any], Any], model: Model) -> None:
        hold, own = conversation
        with attach(model):
            cache = CapsuleCache(model.config, keeper)
            for out, expected in zip(hold(cache), own, strict=True):
                assert_same(out, expected)
        assert cache.get_seq_length() == own[1].sequences.shape[1] - 1
        assert not torch.equal(own[0].sequences[:, -8:], own[1].sequences[:, -8:])

    def test_a_new_image_is_compressed(self, model: Model, make_batch: Batch, greedy: dict[str, Any], processor: Any) -> None:
        first, pixels = make_batch((1, "Read line 2.")), make_batch((2, ""))["pixel_values"][1:]
        with attach(model):
            cache = CapsuleCache(model.config, EvenlySpaced(0.25))
            prefill(model, first, cache)
            before = cache.bytes()
            cache.reset()
            converse(model, first, SECOND["image in each"][:1], cache, greedy, processor, pixels)
        assert cache.bytes().visual == 2 * before.visual
        assert [len(layer.visual) for layer in cache.layers] == [2] * 4

    def test_four_turns_with_padding_in_each(self, model: Model, make_batch: Batch, identity: Callable[..., Capsule]) -> None:
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

    OPTIONS: ClassVar[dict[str, Any]] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}

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
            torch.testing.assert_close(step(attached, cache, tokens, mask), step(attached, own, tokens, mask), rtol=0, atol=EXACT)

    def test_one_token_prompt(self, attached: Model) -> None:
        own, cache = DynamicCache(config=attached.config), CapsuleCache(attached.config, Full())
        for i in range(3):
            tokens, mask = torch.tensor([[40 + i]]), torch.ones(1, i + 1, dtype=torch.int64)
            torch.testing.assert_close(step(attached, cache, tokens, mask), step(attached, own, tokens, mask), rtol=0, atol=EXACT)

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

    def test_reset(self, attached: Model, mixed: BatchFeature, make_batch: Batch, greedy: dict[str, Any], expected: Any) -> None:
        cache = CapsuleCache(attached.config, Full())
        attached.generate(**make_batch((1, "Hello.")), past_key_values=cache, **greedy)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.bytes().total == 0
        assert_same(attached.generate(**mixed, past_key_values=cache, **greedy), expected)

    @pytest.mark.parametrize("method", ["full", "kvcapsule", "quantized", "transform"])
    def test_rows_repeated_and_chosen(
        self,
        method: str,
        attached: Model,
        mixed: BatchFeature,
        random_capsule: Callable[..., Capsule],
        random_transform: Callable[..., Capsule],
    ) -> None:
        methods = {"full": Full(), "kvcapsule": random_capsule(), "quantized": Quantized(4), "transform": random_transform()}
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
        torch.testing.assert_close(step(attached, cache, torch.tensor([[42], [41]]), mask[[2, 1]]), plain[[2, 1]], rtol=0, atol=EXACT)
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([False, True]))
        torch.testing.assert_close(step(attached, cache, torch.tensor([[41]]), mask[[1]]), plain[[1]], rtol=0, atol=EXACT)

    def test_reordering_before_anything_is_stored(self, attached: Model) -> None:
        cache = CapsuleCache(attached.config, Full())
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.get_seq_length() == 0

    def test_embeddings_alone_are_refused(self, attached: Model) -> None:
        with pytest.raises(ValueError, match="pass input_ids"):
            attached(inputs_embeds=torch.zeros(1, 4, 128), past_key_values=CapsuleCache(attached.config, Full()))

    def test_layers_that_share_keys_are_refused(self) -> None:
        with pytest.raises(GeometryError, match="gemma3n: its last 15 layers"):
            CapsuleCache(Gemma3nConfig(), Full())


class TestAttach:
    """A context manager that leaves nothing behind."""

    @staticmethod
    def traces(model: Model) -> Any:
        hooks = [
            (name, list(getattr(module, kind)))
            for name, module in model.named_modules()
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
        ]
        configs = (model.config, model.config.text_config, model.config.vision_config)
        own = {name: id(value) for name, value in vars(model).items()}
        return own, hooks, [c._attn_implementation for c in configs], [c.to_dict() for c in configs], model.generate

    @pytest.mark.parametrize("before", ["sdpa", "eager"])
    @pytest.mark.parametrize("method", [Full(), None], ids=["method", "no method"])
    def test_leaves_nothing_behind(
        self, before: str, method: Method | None, model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        batch = make_batch((1, "Read line 2."))
        model.set_attn_implementation(before)
        try:
            traces = self.traces(model)
            with attach(model, method) as inside:
                assert inside is model
                assert model.config.text_config._attn_implementation == IMPLEMENTATION
                assert model.config.vision_config._attn_implementation == before
                model.generate(**batch, **greedy)
            assert self.traces(model) == traces
            with pytest.raises(KeyError), attach(model, method):
                raise KeyError
            assert self.traces(model) == traces
            out = model.generate(**batch, **greedy)
            assert type(out.past_key_values) is DynamicCache
        finally:
            model.set_attn_implementation("sdpa")

    def test_a_generate_of_the_users_own_comes_back(self, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        calls = []
        plain = model.generate

        def own(*args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return plain(*args, **kwargs)

        model.__dict__["generate"] = own
        try:
            with attach(model, Full()):
                model.generate(**make_batch((0, "Hello.")), **greedy)
            assert model.generate is own
            assert isinstance(calls[0]["past_key_values"], CapsuleCache)
        finally:
            del model.__dict__["generate"]

    def test_other_caches_work_inside(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
        with attach(model, PostVisionAttention(0.1)):
            assert_same(model.generate(**mixed, past_key_values=DynamicCache(config=model.config), **greedy), expected, atol=0)
            without = model.generate(**mixed, use_cache=False, **greedy)
            config = GenerationConfig(**{**greedy, "use_cache": False, "eos_token_id": 3, "pad_token_id": 0})
            by_config = [model.generate(**mixed, generation_config=config), model.generate(None, config, **mixed)]
            before, model.generation_config.use_cache = model.generation_config.use_cache, False
            try:
                by_config.append(model.generate(**mixed, **greedy))
            finally:
                model.generation_config.use_cache = before
        for out in (without, *by_config):
            assert torch.equal(out.sequences, expected.sequences)
            assert out.past_key_values is None

    def test_a_cache_outside_is_refused(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
        with pytest.raises(RuntimeError, match=r"never read it.*with kvcapsule\.attach\(model"):
            model.generate(**mixed, past_key_values=CapsuleCache(model.config, Full()), **greedy)
        assert_same(model.generate(**mixed, **greedy), expected, atol=0)
        assert_same(run(model, Full(), mixed, **greedy), expected)

    def test_nested(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
        with attach(model, Full()):
            with pytest.raises(RuntimeError, match="attached already"), attach(model, Full()):
                pass
            assert_same(model.generate(**mixed, **greedy), expected)
        assert model.config.text_config._attn_implementation == "sdpa"

    def test_another_geometry_is_refused(self, model: Model, identity: Callable[..., Capsule]) -> None:
        capsule = identity(49)
        other = copy.deepcopy(model.config)
        other.text_config.num_key_value_heads = 4
        traces = self.traces(model)
        with pytest.raises(GeometryError, match="kv_heads: 4 != 2"), attach(model, _Made(capsule, KVGeometry.from_config(other))):
            pass
        assert self.traces(model) == traces

    @pytest.mark.parametrize("layer", [0, 2])
    @pytest.mark.parametrize("part", ["self_attn", "mlp"])
    def test_an_aborted_forward_does_not_poison_the_next(
        self, layer: int, part: str, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        with attach(model, Full()):
            handle = getattr(model.get_decoder().layers[layer], part).register_forward_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**mixed, **greedy)
            handle.remove()
            assert_same(model.generate(**mixed, **greedy), expected)

    def test_a_pending_call_does_not_reach_another_cache(
        self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        """A forward that stopped between update and attention, then the model's own cache."""
        with attach(model):
            cache = CapsuleCache(model.config, Full())
            prefill(model, mixed, cache)
            cache.layers[0].update(torch.zeros(3, 2, 5, 32), torch.zeros(3, 2, 5, 32))
            assert_same(model.generate(**mixed, past_key_values=DynamicCache(config=model.config), **greedy), expected, atol=0)
            cache.layers[0].update(torch.zeros(3, 2, 5, 32), torch.zeros(3, 2, 5, 32))
        with attach(model):
            assert attention._pending.get() is None

    def test_pipeline(self, model: Model, processor: Any, images: Any) -> None:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        turns = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Read line 2."}]}]
        options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
        written = [pipe(text=turns, generate_kwargs=options)[0]["generated_text"][-1]["content"]]
        for method in (Full(), PostVisionAttention(0.01)):
            with attach(model, method):
                written.append(pipe(text=turns, generate_kwargs=options)[0]["generated_text"][-1]["content"])
        assert written[1] == written[0]
        assert written[2] != written[0]

    def test_forward_without_cache(self, model: Model, mixed: BatchFeature) -> None:
        with torch.no_grad():
            plain = model(**mixed, use_cache=False).logits
            with attach(model, PostVisionAttention(0.1)):
                torch.testing.assert_close(model(**mixed, use_cache=False).logits, plain, rtol=0, atol=0)


class _Made:
    """A method made for some geometry."""

    def __init__(self, method: Method, geometry: KVGeometry) -> None:
        self.compress, self.geometry = method.compress, geometry

    def require_geometry(self, geometry: KVGeometry) -> None:
        self.geometry.require(geometry)


L, H, D, T, FLOAT, INT = 4, 2, 32, 196, 4, 8
"""Layers, KV heads, head dim, visual tokens of an image; bytes of an element and of an owner."""


def row_bytes(rows: float, entries: int) -> int:
    """Raw keys and values of `rows` rows in all layers, each layer with its owners."""
    return int(L * (2 * H * D * FLOAT * rows + INT * entries))


def code_bytes(bits: int) -> int:
    """The three images of the mixed batch lie in two entries, of one and of two."""
    packed = sum(-(-tokens // 8) * bits for tokens in (T, 2 * T))
    return L * (2 * H * D * (packed + 2 * 2 * FLOAT) + 2 * INT)


def tile_bytes(a_tile: int, tile: int, images: int = 3) -> int:
    """So many bytes of codes or rows for each tile; tiles' frames and owners are common to all layers; what fills no tile is raw."""
    tiles, rest = divmod(T, tile)
    raw = row_bytes(images * rest, 2) if rest else 0
    return images * tiles * (L * a_tile + D * FLOAT + INT) + raw


def capsule_bytes(keys: int, values: int, tile: int) -> int:
    """Rows of keys and values for each tile."""
    return tile_bytes(H * D * FLOAT * (keys + values), tile)


def latent_bytes(rows: int, bits: int, tile: int) -> int:
    """As many rows of keys as of values, in few bits, with a step and a zero for each channel."""
    return tile_bytes(2 * H * D * (-(-rows // 8) * bits + 2 * FLOAT), tile)


def transform_bytes(keys: tuple[int, int], values: tuple[int, int], tile: int, joint: int = 1) -> int:
    """Eight rows of a channel of a set of heads are a cell; cells are of 8, 4, 3, 2, 1 and 0 bytes, as many of each."""
    cells = [H // joint * rows // 8 * channels for rows, channels in (keys, values)]
    assert not any(n % 6 for n in cells)
    return tile_bytes(sum(cells) * 18 // 6, tile)


COMPRESSING: dict[str, tuple[Callable[[Any, Any], Method], int]] = {
    "post-vision-attention 0.4": (lambda *_: PostVisionAttention(0.4), row_bytes(3 * 78, 2)),
    "evenly-spaced 0.4": (lambda *_: EvenlySpaced(0.4), row_bytes(3 * 78, 2)),
    "quantized 2": (lambda *_: Quantized(2), code_bytes(2)),
    "quantized 4": (lambda *_: Quantized(4), code_bytes(4)),
    "quantized 8": (lambda *_: Quantized(8), code_bytes(8)),
    "kvcapsule 0.25": (lambda capsule, _: capsule(0.25, 0.25, 49), capsule_bytes(13, 13, 49)),
    "kvcapsule 0.1 and 0.4, tile 50": (lambda capsule, _: capsule(0.1, 0.4, 50), capsule_bytes(5, 20, 50)),
    "kvcapsule with mlp": (lambda capsule, _: capsule(0.25, 0.25, 49, key_decoder="mlp", hidden=8), capsule_bytes(13, 13, 49)),
    "kvcapsule in 3 bits": (lambda capsule, _: capsule(0.25, 0.25, 49, latent_bits=3), latent_bytes(13, 3, 49)),
    "transform, tile 50": (lambda _, transform: transform(50, (16, 12), (24, 20)), transform_bytes((16, 12), (24, 20), 50)),
    "transform of all heads": (
        lambda _, transform: transform(49, (16, 48), (24, 20), joint_heads=2),
        transform_bytes((16, 48), (24, 20), 49, joint=2),
    ),
}


@pytest.fixture(scope="module", params=COMPRESSING)
def compressed(
    request: pytest.FixtureRequest,
    random_capsule: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
    model: Model,
    mixed: BatchFeature,
    greedy: dict[str, Any],
) -> tuple[Method, int, Any]:
    """A method, the bytes that it promises for the mixed batch, and its answer."""
    build, promised = COMPRESSING[request.param]
    method = build(random_capsule, random_transform)
    return method, promised, run(model, method, mixed, **greedy)


class TestCompressing:
    """Every method that loses something, through every property."""

    def test_first_token_is_exact(self, compressed: tuple[Method, int, Any], expected: Any) -> None:
        torch.testing.assert_close(compressed[2].logits[0], expected.logits[0], rtol=0, atol=0)

    def test_later_tokens_read_what_is_stored(self, compressed: tuple[Method, int, Any], expected: Any) -> None:
        """Row 2 has no image and loses nothing; the others do."""
        ours, theirs = compressed[2].logits[1], expected.logits[1]
        torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=EXACT)
        assert ((ours - theirs)[:2].abs().amax(dim=1) > 1e-4).all()

    def test_bytes_are_as_promised(self, compressed: tuple[Method, int, Any], mixed: BatchFeature, model: Model) -> None:
        _, promised, out = compressed
        held = out.past_key_values.bytes()
        assert held.visual == promised
        assert held.other == 0
        assert held.tail == L * 2 * H * D * FLOAT * 64 * 3
        text = int(mixed["attention_mask"].sum()) - 3 * T
        assert row_bytes(text, 3) <= held.text <= 1.25 * row_bytes(text, 3)
        assert held.total == held.visual + held.text + held.tail

    def test_batch_is_one_by_one(
        self, compressed: tuple[Method, int, Any], model64: Model, mixed: BatchFeature, processor: Any, images: Any, greedy: dict[str, Any]
    ) -> None:
        """In float64: in float32, a last bit of a key can turn a code into its neighbour."""
        method, first, tokens = compressed[0], 0, 4
        options = {**greedy, "max_new_tokens": tokens, "min_new_tokens": tokens}
        out = run(model64, method, in_dtype(mixed, torch.float64), **options)
        for row, (count, words) in enumerate(MIXED):
            text = f"<|user|>{'<image>' * count}{words}<|assistant|>"
            alone = in_dtype(processor(images=images[first : first + count] or None, text=text, return_tensors="pt"), torch.float64)
            first += count
            one = run(model64, method, alone, **options)
            assert torch.equal(one.sequences[0, -tokens:], out.sequences[row, -tokens:])
            for ours, theirs in zip(one.logits, out.logits, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=1e-6)

    def test_deterministic(self, compressed: tuple[Method, int, Any], model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> None:
        assert_same(run(model, compressed[0], mixed, **greedy), compressed[2], atol=0)

    def test_attention_reads_what_the_segments_stand_for(
        self, compressed: tuple[Method, int, Any], model: Model, mixed: BatchFeature, greedy: dict[str, Any]
    ) -> None:
        """The same answer from the keys and values written out in full."""
        assert_same(run(model, _WrittenOut(compressed[0]), mixed, **greedy), compressed[2], atol=2e-5)

    def test_beams_are_reordered(
        self, compressed: tuple[Method, int, Any], model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
        options = {**greedy, "num_beams": 3}
        assert_same(run(model, compressed[0], batch, **options), run(model, _WrittenOut(compressed[0]), batch, **options), atol=2e-5)


class _WrittenOut:
    """A method whose visual segments are stored as the full keys and values that they stand for."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def compress(self, prefill: LayerPrefill) -> Compressed:
        visual, text = self.method.compress(prefill)
        return Compressed([Segment(*s.materialize(), s.owner, bias=s.bias, mask=s.mask) for s in visual], text)


def test_eight_bits_are_close_to_all(model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
    assert_same(run(model, Quantized(8), mixed, **greedy), expected, atol=0.05)
    two = {**greedy, "max_new_tokens": 2, "min_new_tokens": 2}
    errors = [(run(model, Quantized(bits), mixed, **two).logits[1] - expected.logits[1])[:2].abs().max() for bits in (8, 4, 2)]
    assert errors[0] < errors[1] < errors[2]


def test_parameters_are_stored_once(model: Model, mixed: BatchFeature, random_capsule: Callable[..., Capsule]) -> None:
    """Parameters are those of the capsule: no more after a second image, no more for a larger batch."""
    capsule = random_capsule()
    own = sum(p.numel() * p.element_size() for codec in capsule.layers for p in (codec.keys.theta, codec.values.basis, codec.values.mean))
    with attach(model):
        cache = CapsuleCache(model.config, capsule)
        prefill(model, mixed, cache)
        assert cache.bytes().parameters == own
        mask = torch.cat([mixed["attention_mask"]] * 2, dim=1)
        call = {**mixed, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, mixed["input_ids"].shape[1] :]}
        prefill(model, BatchFeature(call), cache)
        assert cache.bytes().parameters == own
        cache.batch_repeat_interleave(3)
        assert cache.bytes().parameters == own

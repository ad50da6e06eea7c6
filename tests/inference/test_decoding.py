"""generate's ways of decoding: with a CapsuleCache that keeps everything they give what they give with the model's own
cache."""

import copy
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, Model, assert_same, longer, ready, run, step, tiny_qwen
from transformers import (
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache, passed_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention
from kvcapsule.vlm.geometry import KVGeometry

Batch = Callable[..., BatchFeature]
REPEATING = "Transcribe the page. Transcribe the page."


@pytest.fixture(scope="module")
def batch(make_batch: Batch) -> BatchFeature:
    return make_batch((1, REPEATING))


@pytest.fixture(scope="module")
def draft(model: Model) -> Model:
    """A model that is right now and then."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.fixture(params=["a draft model", "itself", "prompt lookup"])
def assistance(request: pytest.FixtureRequest, model: Model, draft: Model) -> dict[str, Any]:
    ways = {"a draft model": {"assistant_model": draft}, "itself": {"assistant_model": model}}
    return ways.get(request.param, {"prompt_lookup_num_tokens": 3})


@pytest.fixture(scope="module")
def wordy(greedy: dict[str, Any]) -> dict[str, Any]:
    return {**greedy, "max_new_tokens": 16, "min_new_tokens": 16}


class TestAssisted:
    """Candidate tokens are fed with the prompt, so a prompt is compressed only once those that were wrong are taken
    back."""

    def test_everything_kept(
        self,
        assistance: dict[str, Any],
        model: Model,
        batch: BatchFeature,
        wordy: dict[str, Any],
        identity: Callable[..., Capsule],
    ) -> None:
        assert_same(
            run(model, identity(50), batch, **wordy, **assistance), model.generate(**batch, **wordy, **assistance)
        )

    def test_candidates_are_no_part_of_the_prompt(
        self, assistance: dict[str, Any], model: Model, batch: BatchFeature, wordy: dict[str, Any]
    ) -> None:
        """A method that loses something stores the prompt alone, and answers as it does unassisted."""
        lengths = []

        class Witness(PostVisionAttention):
            def compress(self, prefill: LayerPrefill) -> Compressed:
                lengths.append(
                    (prefill.keys.shape[2], prefill.query.shape[2], prefill.values.shape[2], prefill.valid.shape[1])
                )
                return super().compress(prefill)

        plain = run(model, PostVisionAttention(0.2), batch, **wordy)
        out = run(model, Witness(0.2), batch, **wordy, **assistance)
        assert_same(out, plain)
        # Where the model drafts for itself, it does so over a cache of its own.
        prompt = batch["input_ids"].shape[1]
        assert lengths.count((prompt,) * 4) == 4
        assert max(lengths) == (prompt,) * 4
        assert output_cache(out).bytes().visual == output_cache(plain).bytes().visual
        assert output_cache(out).get_seq_length() == output_cache(plain).get_seq_length()
        assert not torch.equal(out.sequences, model.generate(**batch, **wordy).sequences)

    def test_wrong_candidates_behind_the_prompt(
        self, model: Model, batch: BatchFeature, greedy: dict[str, Any]
    ) -> None:
        """The very first forward brings candidates, some of them wrong."""
        removed = []

        class Cache(CapsuleCache):
            def crop(self, tokens_to_remove: int) -> None:
                removed.append((self.get_seq_length() - batch["input_ids"].shape[1], -tokens_to_remove))
                super().crop(tokens_to_remove)

        stubborn = copy.deepcopy(model)
        stubborn.lm_head.weight.copy_(stubborn.lm_head.weight.flip(0))
        options = {**greedy, "assistant_model": stubborn}
        with attach(model):
            out = model.generate(**batch, **cache_argument(Cache(model.config, Full())), **options)
        assert_same(out, model.generate(**batch, **options))
        assert removed[0][0] == removed[0][1] > 0

    def test_candidates_behind_a_new_image(self, model: Model, make_batch: Batch, batch: BatchFeature) -> None:
        """By direct forwards: transformers' assisted decoding itself does not go on from a cache."""
        second = make_batch((2, "And here?"))
        start = int((second["input_ids"] == model.config.image_token_id).nonzero()[0, 1])
        ids = torch.cat([second["input_ids"][:, :start], second["input_ids"][:, start + 196 :]], dim=1)
        logits = []
        for cache in (DynamicCache(config=model.config), CapsuleCache(model.config, Full())):
            with attach(model), torch.no_grad():
                cache.activate_past_recording()
                model(**batch, **cache_argument(cache))
                cache.crop(0)
                mask = longer(batch["attention_mask"], ids.shape[1] + 3)
                call = {"input_ids": longer(ids, 3), "attention_mask": mask, "pixel_values": second["pixel_values"][1:]}
                model(**call, **cache_argument(cache))
                cache.crop(-2)
                logits.append(step(model, cache, torch.tensor([[40]]), mask[:, :-1]))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=EXACT)

    def test_an_image_is_not_taken_back(self, model: Model, batch: BatchFeature) -> None:
        with attach(model), torch.no_grad():
            cache = CapsuleCache(model.config, Full())
            cache.activate_past_recording()
            model(**batch, **cache_argument(cache))
            with pytest.raises(
                ValueError, match=r"cannot remove 60 tokens of a prefill of \d+: .* an image is among them"
            ):
                cache.crop(-60)
            cache.crop(-1)
            assert cache.get_seq_length() == batch["input_ids"].shape[1] - 1
            assert cache.bytes().visual > 0

    def test_what_waits_is_counted_and_not_forgotten(self, model: Model, batch: BatchFeature) -> None:
        length = batch["input_ids"].shape[1]
        with attach(model), torch.no_grad():
            caches = [CapsuleCache(model.config, EvenlySpaced(0.1)) for _ in range(2)]
            caches[1].activate_past_recording()
            for cache in caches:
                model(**batch, **cache_argument(cache))
            assert caches[1].bytes().tail == 4 * (2 + 2 + 4) * length * 32 * 4
            logits = [step(model, cache, torch.tensor([[40]]), longer(batch["attention_mask"], 1)) for cache in caches]
        assert caches[1].bytes() == caches[0].bytes()
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)


def contrastive(
    model: PreTrainedModel, input_ids: torch.Tensor, logits_processor: Any, stopping_criteria: Any, **kwargs: Any
) -> torch.Tensor:
    """Contrastive search (arXiv 2202.06417) over a given cache: candidates of one prompt as rows, of which one is
    kept."""
    top_k, alpha, new = 4, 0.6, 8
    kwargs.pop("generation_config")
    cache, inputs = (
        passed_cache(kwargs),
        {k: kwargs[k] for k in ("attention_mask", "pixel_values", "mm_encoder_outputs") if k in kwargs},
    )
    mask = inputs["attention_mask"]
    out = model(input_ids=input_ids, **cache_argument(cache), output_hidden_states=True, **inputs)
    past, logits = out.hidden_states[-1], out.logits[:, -1]
    for _ in range(new):
        chances, tokens = logits_processor(input_ids, logits).softmax(-1).topk(top_k)
        cache.batch_repeat_interleave(top_k)
        mask = longer(mask, 1)
        rows = mask.repeat_interleave(top_k, dim=0)
        ids = tokens.view(-1, 1)
        positions = rows.sum(dim=1, keepdim=True) - 1
        out = model(
            input_ids=ids,
            attention_mask=rows,
            position_ids=positions,
            **cache_argument(cache),
            output_hidden_states=True,
        )
        hidden = out.hidden_states[-1].unflatten(0, (-1, top_k))
        likeness = (
            torch.cosine_similarity(past[:, None], hidden, dim=-1).masked_fill(mask[:, None, :-1] == 0, -1).amax(-1)
        )
        best = ((1 - alpha) * chances - alpha * likeness).argmax(dim=1)
        chosen = torch.arange(len(best)) * top_k + best
        cache.batch_select_indices(chosen)
        input_ids = torch.cat([input_ids, ids[chosen]], dim=1)
        past, logits = torch.cat([past, hidden.flatten(0, 1)[chosen]], dim=1), out.logits[chosen, -1]
    return input_ids


class TestOtherWays:
    def test_contrastive_search(self, model: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        """transformers loads its own from the Hub; what it asks of a cache is this."""
        batch = make_batch((1, "Read line 2."), (0, "What is the number beside the owl?"))
        options = {"suppress_tokens": greedy["suppress_tokens"], "custom_generate": contrastive, "do_sample": False}
        expected = model.generate(**batch, **options)
        assert torch.equal(run(model, Full(), batch, **options), expected)
        assert not torch.equal(run(model, PostVisionAttention(0.01), batch, **options), expected)

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"penalty_alpha": 0.6, "top_k": 4}, "Contrastive Search"),
            ({"dola_layers": "low"}, "Dola Generation"),
            ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "Group Beam Search"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_what_transformers_has_given_away(
        self, options: dict[str, Any], named: str, model: Model, batch: BatchFeature
    ) -> None:
        """Its own message, which names the feature and what to do."""
        with pytest.raises(ValueError, match=rf"{named} requires `trust_remote_code=True`"):
            run(model, Full(), batch, max_new_tokens=2, **options)

    @pytest.mark.parametrize("kind", ["offloaded_static", "quantized", "offloaded", "dynamic"])
    @pytest.mark.parametrize("place", ["option", "generation config", "the model's generation config"])
    def test_another_kind_of_cache_is_refused(
        self, kind: str, place: str, model: Model, batch: BatchFeature, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        options: dict[str, Any] = {"max_new_tokens": 2}
        if place == "option":
            options["cache_implementation"] = kind
        elif place == "generation config":
            options = {"generation_config": GenerationConfig(cache_implementation=kind, max_new_tokens=2)}
        else:
            monkeypatch.setattr(model.generation_config, "cache_implementation", kind)
        with pytest.raises(ValueError, match=rf"cache_implementation='{kind}' asks for .* Leave the option out"):
            run(model, Full(), batch, **options)

    def test_a_default_of_the_hub_is_not_refused(
        self, model: Model, batch: BatchFeature, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Generation configs of Gemma models name a cache that transformers no longer has."""
        monkeypatch.setattr(model.generation_config, "cache_implementation", "hybrid")
        assert isinstance(output_cache(run(model, Full(), batch, **greedy)), CapsuleCache)

    @pytest.mark.parametrize("given", [True, False], ids=["cache given", "none given"])
    @pytest.mark.parametrize(
        ("options", "error", "named"),
        [
            ({"prefill_chunk_size": 64}, ValueError, "prefill_chunk_size=64"),
            ({"output_attentions": True, "return_dict_in_generate": True}, NotImplementedError, "output_attentions"),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_refused_options(
        self,
        given: bool,
        options: dict[str, Any],
        error: type[Exception],
        named: str,
        model: Model,
        batch: BatchFeature,
    ) -> None:
        with attach(model, None if given else Full()), pytest.raises(error, match=rf"{named}.*Leave the option out"):
            cache = CapsuleCache(model.config, Full()) if given else None
            model.generate(**batch, max_new_tokens=2, **cache_argument(cache), **options)


class TestStreaming:
    def test_text_streamer(
        self,
        model: Model,
        batch: BatchFeature,
        greedy: dict[str, Any],
        processor: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        expected = model.generate(**batch, **greedy).sequences
        out = run(model, Full(), batch, streamer=TextStreamer(processor.tokenizer, skip_prompt=True), **greedy)
        assert torch.equal(out.sequences, expected)
        assert (
            capsys.readouterr().out.strip()
            == processor.tokenizer.decode(expected[0, batch["input_ids"].shape[1] :]).strip()
            != ""
        )

    def test_threads(
        self, model: Model, make_batch: Batch, greedy: dict[str, Any], processor: Any, identity: Callable[..., Capsule]
    ) -> None:
        """Three answers at once, each streamed to its own reader: a capsule's frames are of its own thread's
        positions."""
        batches = [make_batch((1, "Read line 2.")), make_batch((0, "What is the number beside the owl?"))]
        batches += [make_batch((2, "Transcribe the page."))]
        plain = [model.generate(**one, **greedy).sequences[0, one["input_ids"].shape[1] :] for one in batches]
        streams, threads = [], []
        with attach(model, identity(49)):
            for one in batches:
                streams.append(TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60))
                threads.append(Thread(target=model.generate, kwargs={**one, **greedy, "streamer": streams[-1]}))
            for thread in threads:
                thread.start()
            texts = ["".join(stream) for stream in streams]
            for thread in threads:
                thread.join()
        assert texts == [processor.tokenizer.decode(tokens) for tokens in plain]
        assert len(set(texts)) == 3


FIVE = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "output_logits": True,
    "return_dict_in_generate": True,
}


@pytest.fixture(scope="module", params=["llava", "qwen"])
def chat(
    request: pytest.FixtureRequest, model: Model, make_batch: Batch, greedy: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """A model; what each turn adds: its token ids and the inputs of its new images; options of generate."""
    if request.param == "llava":
        batches = [make_batch((1, "Read line 2.")), make_batch((2, "And here?")), make_batch((0, "Sum them up."))]
        two = batches[1]["input_ids"]
        image = model.config.image_token_id
        second = torch.cat(
            [two[:, : int((two == image).nonzero()[0, 1])], two[:, int((two == image).nonzero()[0, 1]) + 196 :]], dim=1
        )
        turns = [
            (batches[0]["input_ids"], {"pixel_values": batches[0]["pixel_values"]}),
            (second, {"pixel_values": batches[1]["pixel_values"][1:]}),
            (batches[2]["input_ids"], {}),
        ]
        return model, turns, {**FIVE, "suppress_tokens": greedy["suppress_tokens"]}
    built, inputs = ready(*tiny_qwen())
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    grids = inputs["image_grid_thw"]
    turns = [
        (ids[:, :28], {"pixel_values": pixels[:96], "image_grid_thw": grids[:1]}),
        (ids[:, 28:], {"pixel_values": pixels[96:], "image_grid_thw": grids[1:]}),
        (torch.tensor([[7, 6, 5, 9]]), {}),
    ]
    return built, turns, {**FIVE, "suppress_tokens": [90, 91, 92, 93, 94], "pad_token_id": 0}


class TestChat:
    """Three turns, a new image in the second. Each turn brings the images that are new; LLaVA takes the whole
    conversation's token ids, Qwen2.5-VL, whose position ids are made from all images, those that are not cached.
    """

    @staticmethod
    def hold(model: Any, turns: Any, cache: Any, options: dict[str, Any]) -> tuple[list[Any], list[torch.Tensor]]:
        """Each turn's output, and the position ids of every forward."""
        positions: list[torch.Tensor] = []

        def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            positions.append(kwargs["position_ids"].clone())

        handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        ids, outs, lengths, qwen = (
            torch.zeros(1, 0, dtype=torch.int64),
            [],
            [],
            hasattr(model.config, "vision_start_token_id"),
        )
        try:
            for new, images in turns:
                ids = torch.cat([ids, new], dim=1)
                given = ids[:, cache.get_seq_length() :] if qwen else ids
                types = {"mm_token_type_ids": (given == model.config.image_token_id).int()} if qwen else {}
                inputs = {"input_ids": given, "attention_mask": torch.ones_like(ids), **images, **types}
                outs.append(model.generate(**inputs, **cache_argument(cache), **options))
                ids = torch.cat([ids, outs[-1].sequences[:, given.shape[1] :]], dim=1)
                lengths.append(cache.get_seq_length() - ids.shape[1])
        finally:
            handle.remove()
        # The last token written is not read yet.
        assert lengths == [-1] * 3
        return outs, positions

    @pytest.mark.parametrize("tile", [None, 6, 50])
    def test_three_turns(self, tile: int | None, chat: tuple[Any, Any, dict[str, Any]]) -> None:
        model, turns, options = chat
        expected, ids = self.hold(model, turns, DynamicCache(config=model.config.get_text_config()), options)
        method: Any = Full()
        if tile is not None:
            method = Capsule(
                CapsuleConfig("identity", IdentityConfig(tile), KVGeometry.from_config(model.config), "tiny")
            )
        with attach(model):
            outs, ours = self.hold(model, turns, CapsuleCache(model.config, method), options)
        for out, other in zip(outs, expected, strict=True):
            assert_same(out, other)
        assert len(ours) == len(ids) == 15
        for here, there in zip(ours, ids, strict=True):
            assert torch.equal(here, there)

    def test_positions_where_much_is_dropped(self, chat: tuple[Any, Any, dict[str, Any]]) -> None:
        """Position ids are those of the full cache at every step, though the tokens differ."""
        model, turns, options = chat
        _, ids = self.hold(model, turns, DynamicCache(config=model.config.get_text_config()), options)
        with attach(model):
            outs, ours = self.hold(model, turns, CapsuleCache(model.config, EvenlySpaced(0.05)), options)
        assert all(torch.equal(here, there) for here, there in zip(ours, ids, strict=True))
        assert [len(layer.visual) for layer in output_cache(outs[-1]).layers] == [2] * len(output_cache(outs[-1]))

    def test_pipeline(self, model: Model, processor: Any, images: Any) -> None:
        """The pipeline keeps no cache: it feeds every turn whole, both images in the second and third."""
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}

        def hold() -> list[str]:
            talk: list[Any] = []
            for image, words in ((images[0], "Read line 2."), (images[1], "And here?"), (None, "Sum them up.")):
                content = [{"type": "text", "text": words}]
                talk.append(
                    {"role": "user", "content": ([{"type": "image", "image": image}] if image else []) + content}
                )
                talk = pipe(text=talk, generate_kwargs=options)[0]["generated_text"]
            return [turn["content"] for turn in talk if turn["role"] == "assistant"]

        expected = hold()
        with attach(model, Full()):
            assert hold() == expected
        assert len(expected) == len(set(expected)) == 3

"""generate's ways of decoding: with a CapsuleCache that keeps everything they give what they give with the model's own
cache."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.decoding import REPEATING, Batch
from support.run_vlm import EXACT, Model, assert_same, longer, run, step
from transformers import (
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    PreTrainedModel,
)

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache, passed_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention


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

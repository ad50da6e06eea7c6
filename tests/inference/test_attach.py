"""Attaching a method to a model: a context manager that leaves nothing behind."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.run_vlm import assert_same, prefill, run
from transformers import BatchFeature, DynamicCache, GenerationConfig, LlavaForConditionalGeneration, pipeline

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import GeometryError
from kvcapsule.inference import attention_interface
from kvcapsule.inference.attach import attach
from kvcapsule.inference.attention_interface import IMPLEMENTATION
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache, passed_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import Full, PostVisionAttention
from kvcapsule.vlm.geometry import KVGeometry

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration


class TestAttach:
    """A context manager that leaves nothing behind."""

    @staticmethod
    def traces(model: Model) -> Any:
        hooks = [
            (name, list(getattr(module, kind)))
            for name, module in model.named_modules()
            for kind in (
                "_forward_hooks",
                "_forward_pre_hooks",
                "_forward_hooks_with_kwargs",
                "_forward_pre_hooks_with_kwargs",
            )
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
            # transformers hangs hooks of its own on a model when it first runs.
            model.generate(**batch, **greedy)
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
            assert type(output_cache(out)) is DynamicCache
        finally:
            model.set_attn_implementation("sdpa")

    def test_a_generate_of_the_users_own_comes_back(
        self, model: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
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
            assert isinstance(passed_cache(calls[0]), CapsuleCache)
        finally:
            del model.__dict__["generate"]

    def test_other_caches_work_inside(
        self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        with attach(model, PostVisionAttention(0.1)):
            assert_same(
                model.generate(**mixed, **cache_argument(DynamicCache(config=model.config)), **greedy), expected, atol=0
            )
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
            assert output_cache(out) is None

    def test_a_cache_outside_is_refused(
        self, model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any
    ) -> None:
        with pytest.raises(RuntimeError, match=r"never read it.*with kvcapsule\.attach\(model"):
            model.generate(**mixed, **cache_argument(CapsuleCache(model.config, Full())), **greedy)
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
        with (
            pytest.raises(GeometryError, match="kv_heads: 4 != 2"),
            attach(model, _Made(capsule, KVGeometry.from_config(other))),
        ):
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
            assert_same(
                model.generate(**mixed, **cache_argument(DynamicCache(config=model.config)), **greedy), expected, atol=0
            )
            cache.layers[0].update(torch.zeros(3, 2, 5, 32), torch.zeros(3, 2, 5, 32))
        with attach(model):
            assert attention_interface._pending.get() is None

    def test_pipeline(self, model: Model, processor: Any, images: Any) -> None:
        pipe = pipeline("image-text-to-text", model=model, processor=processor)
        turns = [
            {
                "role": "user",
                "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "Read line 2."}],
            }
        ]
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


class _Made(Method):
    """A method made for some geometry."""

    def __init__(self, method: Method, geometry: KVGeometry) -> None:
        self.method, self.geometry = method, geometry

    def compress(self, prefill: LayerPrefill) -> Compressed:
        return self.method.compress(prefill)

    def require_geometry(self, geometry: KVGeometry) -> None:
        self.geometry.require(geometry)

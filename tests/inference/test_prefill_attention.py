"""Prefill runs the attention that the model ran before it was attached, whatever its masks look like."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, Model, assert_same, in_dtype, longer, prefill, ready, run, step, tiny_gemma
from transformers import AttentionInterface, AttentionMaskInterface, BatchFeature, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference import attention_interface
from kvcapsule.inference.attach import attach
from kvcapsule.inference.attention_interface import IMPLEMENTATION
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import EvenlySpaced, Full

IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention"]


@contextmanager
def running(model: Any, implementation: str) -> Iterator[None]:
    """The language part with another attention. Flex attention without compiling it: that takes a minute on a CPU."""
    text = model.config.get_text_config(decoder=True)
    before = text._attn_implementation
    with torch.compiler.set_stance("force_eager") if implementation == "flex_attention" else nullcontext():
        model.set_attn_implementation({"text_config": implementation})
        try:
            yield
        finally:
            model.set_attn_implementation({"text_config": before})


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def witness() -> Iterator[dict[str, list[Any]]]:
    """An attention registered by the user, named "witness": sdpa's, which notes its calls and the masks made for it."""
    seen: dict[str, list[Any]] = {"attention": [], "mask": []}

    def witnessed(module: torch.nn.Module, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["attention"].append((query.shape[2], module.config._attn_implementation))
        return sdpa_attention_forward(module, query, *args, **kwargs)

    def witnessed_mask(*args: Any, **kwargs: Any) -> Any:
        seen["mask"].append(kwargs["q_length"])
        return sdpa_mask(*args, **kwargs)

    for name in ("witness", "flash_witness"):
        AttentionInterface.register(name, witnessed)
        AttentionMaskInterface.register(name, witnessed_mask)
    yield seen
    for name in ("witness", "flash_witness"):
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


class TestOwnAttention:
    def test_everything_kept(
        self,
        implementation: str,
        model: Model,
        mixed: BatchFeature,
        greedy: dict[str, Any],
        identity: Callable[..., Capsule],
    ) -> None:
        """With padding, several images and none; the first token is that of the very attention, and inside, other
        caches read it too."""
        with running(model, implementation):
            expected = model.generate(**mixed, **greedy)
            out = run(model, identity(50), mixed, **greedy)
            assert_same(out, expected)
            torch.testing.assert_close(out.logits[0], expected.logits[0], rtol=0, atol=0)
            with attach(model, EvenlySpaced(0.1)):
                assert_same(
                    model.generate(**mixed, **cache_argument(DynamicCache(config=model.config)), **greedy),
                    expected,
                    atol=0,
                )
            assert model.config.text_config._attn_implementation == implementation

    def test_layers_with_a_window(self, implementation: str) -> None:
        """Its window makes Gemma 3's own layers read masks of their own form while the others read segments."""
        built, batch = ready(*tiny_gemma())
        options = {
            "max_new_tokens": 6,
            "do_sample": False,
            "output_logits": True,
            "return_dict_in_generate": True,
            "pad_token_id": 0,
        }
        with running(built, implementation):
            assert_same(run(built, Full(), batch, **options), built.generate(**batch, **options))
            own, cache, logits = DynamicCache(config=built.config), CapsuleCache(built.config, Full()), []
            with attach(built):
                for past in (own, cache):
                    prefill(built, batch, past)
                    # Several tokens at once, of which the window and the order hide something from each.
                    logits.append(step(built, past, torch.tensor([[40, 41, 42]]), longer(batch["attention_mask"], 3)))
            torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=EXACT)

    def test_it_runs_in_prefill_alone(
        self, witness: dict[str, list[Any]], model: Model, mixed: BatchFeature, greedy: dict[str, Any]
    ) -> None:
        length, layers = mixed["input_ids"].shape[1], model.config.text_config.num_hidden_layers
        with running(model, "witness"):
            run(model, Full(), mixed, **greedy)
        assert witness == {"attention": [(length, IMPLEMENTATION)] * layers, "mask": [length]}

    def test_several_turns(self, model: Model, mixed: BatchFeature) -> None:
        """A second turn, with an image too, is read over segments: its mask is not the model's own."""
        with running(model, "eager"):
            own, cache = DynamicCache(config=model.config), CapsuleCache(model.config, Full())
            with attach(model):
                for past in (own, cache):
                    prefill(model, mixed, past)
                mask = torch.cat([mixed["attention_mask"]] * 2, dim=1)
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, mixed["input_ids"].shape[1] :]
                call = BatchFeature({**mixed, "attention_mask": mask, "position_ids": positions})
                valid = mixed["attention_mask"].bool()
                torch.testing.assert_close(
                    prefill(model, call, cache)[valid], prefill(model, call, own)[valid], rtol=0, atol=EXACT
                )
                token, mask = torch.tensor([[40, 41]] * 3), longer(mask, 2)
                torch.testing.assert_close(
                    step(model, cache, token, mask), step(model, own, token, mask), rtol=0, atol=EXACT
                )

    def test_parts_of_the_model_by_themselves(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> None:
        """The language part called past the model's hooks, after a forward over segments: its masks are its own
        attention's."""
        with running(model, "eager"):
            inputs = {
                "inputs_embeds": torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(0)),
                "use_cache": False,
            }
            expected = model.get_decoder()(**inputs).last_hidden_state
            with attach(model, Full()):
                model.generate(**mixed, **greedy)
                torch.testing.assert_close(model.get_decoder()(**inputs).last_hidden_state, expected, rtol=0, atol=0)

    def test_flash_attention_finds_its_name(
        self, witness: dict[str, list[Any]], model: Model, mixed: BatchFeature, greedy: dict[str, Any]
    ) -> None:
        """transformers' flash attention chooses its kernel by the name in the layer's config."""
        text = model.config.text_config
        text._attn_implementation = "flash_witness"
        try:
            run(model, Full(), mixed, **greedy)
            assert text._attn_implementation == "flash_witness"
        finally:
            text._attn_implementation = "sdpa"
        assert [name for _, name in witness["attention"]] == ["flash_witness"] * 4


class TestRefused:
    def test_what_cannot_run_prefill(self, model: Model) -> None:
        text = model.config.text_config
        for name in ("paged|eager", "nobody's"):
            text._attn_implementation = name
            try:
                with (
                    pytest.raises(ValueError, match=r"cannot run the prefill.*set_attn_implementation"),
                    attach(model, Full()),
                ):
                    pass
                assert text._attn_implementation == name
            finally:
                text._attn_implementation = "sdpa"

    def test_eager_attention_that_is_nowhere(self) -> None:
        """A layer may be written outside transformers' modeling files."""
        with pytest.raises(NotImplementedError, match=r"Linear has no eager_attention_forward.*sdpa"):
            attention_interface._function(torch.nn.Linear(1, 1), "eager")

    @pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias"])
    def test_scores_that_segments_do_not_make(
        self, option: str, model: Model, mixed: BatchFeature, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        capped = attention_interface.capsule_attention

        def asking(*args: Any, **kwargs: Any) -> Any:
            return capped(*args, **{option: 30.0}, **kwargs)

        monkeypatch.setitem(AttentionInterface._global_mapping, IMPLEMENTATION, asking)
        with (
            attach(model),
            pytest.raises(NotImplementedError, match=rf"LlamaAttention .*\({option}\).*without a CapsuleCache"),
        ):
            prefill(model, mixed, CapsuleCache(model.config, Full()))

    def test_the_attention_outside(self, model: Model, mixed: BatchFeature, greedy: dict[str, Any]) -> None:
        with running(model, IMPLEMENTATION), pytest.raises(RuntimeError, match=r"runs inside `with kvcapsule\.attach"):
            model.generate(**mixed, **greedy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_precisions(
    dtype: torch.dtype,
    implementation: str,
    model: Model,
    make_batch: Callable[..., BatchFeature],
    identity: Callable[..., Capsule],
) -> None:
    """One step behind a prompt with an image, against the model's own cache: what half precision rounds, and no
    more."""
    other = copy.deepcopy(model).to(dtype)
    batch = in_dtype(make_batch((1, "Read line 2."), (0, "Hello.")), dtype)
    token, mask = torch.tensor([[50], [51]]), longer(batch["attention_mask"], 1)
    with running(other, implementation):
        own = DynamicCache(config=other.config)
        first, expected = prefill(other, batch, own), step(other, own, token, mask)
        with attach(other):
            cache = CapsuleCache(other.config, identity(50))
            valid = batch["attention_mask"].bool()
            torch.testing.assert_close(prefill(other, batch, cache)[valid], first[valid], rtol=0, atol=0)
            logits = step(other, cache, token, mask)
    assert logits.dtype == dtype
    torch.testing.assert_close(
        logits, expected, rtol=0, atol={torch.bfloat16: 0.15, torch.float16: 0.02, torch.float32: EXACT}[dtype]
    )


def test_a_call_that_outlives_the_block_of_another_thread(model: Model) -> None:
    """A thread that attached nothing looked up attention and masks inside of another one's block, and calls them
    behind it: they are the model's own. A copy made inside of the block has none of its own."""
    text = model.config.get_text_config(decoder=True)
    layer = model.get_decoder().layers[0].self_attn
    with attach(model, Full()):
        attention, mask = (
            table[text._attn_implementation] for table in (AttentionInterface(), AttentionMaskInterface())
        )
        copied = copy.deepcopy(text)
    shape = {"batch_size": 1, "q_length": 5, "kv_length": 5, "allow_is_causal_skip": False}
    masks = [function(config=text, **shape) for function in (mask, sdpa_mask)]
    torch.testing.assert_close(*masks)
    query, key, value = torch.randn(8, 1, 5, 32, generator=torch.Generator().manual_seed(0)).split([4, 2, 2])
    query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    outs = [function(layer, query, key, value, masks[0])[0] for function in (attention, sdpa_attention_forward)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="for the very model attached"):
        mask(config=copied, **shape)

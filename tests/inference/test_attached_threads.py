"""What one thread attached is not another's; models that share a config, and copies, do not meet each other's."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny_llava import llava
from support.tiny_vlm import batch, build
from transformers import BatchFeature, DynamicCache, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import output_cache
from kvcapsule.methods.method import Method
from kvcapsule.policy import EvenlySpaced, Full, PostVisionAttention

TINY = llava()
OPTIONS: dict[str, Any] = {
    "max_new_tokens": 6,
    "min_new_tokens": 6,
    "do_sample": False,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
}


@pytest.fixture
def model() -> PreTrainedModel:
    return build("llava", TINY)


@pytest.fixture(scope="module")
def prompt() -> BatchFeature:
    return batch(TINY, [20, 21, TINY.picture(0), 22, 23, 24])


def used(out: Any) -> Method | None:
    """The method of the cache that generate used; None: the model's own cache."""
    cache = output_cache(out)
    assert isinstance(cache, (CapsuleCache, DynamicCache))
    return cache.method if isinstance(cache, CapsuleCache) else None


def in_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).result()


def test_a_thread_that_attached_nothing(model: PreTrainedModel, prompt: BatchFeature) -> None:
    expected = model.generate(**prompt, **OPTIONS).sequences
    with attach(model, EvenlySpaced(0.1)) as attached:
        alone = in_thread(lambda: model.generate(**prompt, **OPTIONS))
        assert used(alone) is None
        assert torch.equal(alone.sequences, expected)
        assert isinstance(used(attached.generate(**prompt, **OPTIONS)), EvenlySpaced)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "peft"])
def test_a_thread_that_is_handed_generate(wrapped: bool, model: PreTrainedModel, prompt: BatchFeature) -> None:
    """As a streamer's thread is: with what was attached where it was handed over, also when that is over there."""
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if wrapped else model
    outs: list[Any] = []

    def run(generate: Any) -> None:
        outs.append(generate(**prompt, **OPTIONS))

    method = PostVisionAttention(0.5)
    with attach(outer, method):
        thread = Thread(target=run, args=(outer.generate,))
        thread.start()
        thread.join()
        thread = Thread(target=copy_context().run, args=(lambda: run(outer.generate),))
        thread.start()
        thread.join()
    assert [used(out) for out in outs] == [method, method]


def test_two_threads_with_methods_of_their_own(model: PreTrainedModel, prompt: BatchFeature) -> None:
    methods: list[Method] = [EvenlySpaced(0.1), PostVisionAttention(0.6), Full()]
    alone = []
    for method in methods:
        with attach(model, method):
            alone.append(model.generate(**prompt, **OPTIONS).sequences)
    barrier = Barrier(len(methods), timeout=60)

    def run(method: Method) -> tuple[list[torch.Tensor], set[Method | None]]:
        with attach(model, method):
            barrier.wait()
            outs = [model.generate(**prompt, **OPTIONS) for _ in range(5)]
            barrier.wait()
        return [out.sequences for out in outs], {used(out) for out in outs}

    with ThreadPoolExecutor(len(methods)) as pool:
        results = list(pool.map(run, methods))
    for method, expected, (sequences, own) in zip(methods, alone, results, strict=True):
        assert own == {method}
        assert all(torch.equal(one, expected) for one in sequences)
    assert "kvcapsule" not in str(model.config.get_text_config()._attn_implementation)
    assert used(model.generate(**prompt, **OPTIONS)) is None


def test_a_block_that_ends_while_another_goes_on(model: PreTrainedModel, prompt: BatchFeature) -> None:
    first = attach(model, EvenlySpaced(0.1))
    in_thread(first.__enter__)
    with attach(model, Full()):
        in_thread(lambda: first.__exit__(None, None, None))
        assert isinstance(used(model.generate(**prompt, **OPTIONS)), Full)
    assert used(model.generate(**prompt, **OPTIONS)) is None


def test_twice_in_one_thread(model: PreTrainedModel) -> None:
    with attach(model, Full()), pytest.raises(RuntimeError, match="attached already"), attach(model, Full()):
        pass


def test_models_of_one_config(model: PreTrainedModel, prompt: BatchFeature) -> None:
    """Each has a method of its own; the one that is not attached runs as it did."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert twin.config is model.config
    expected = model.generate(**prompt, **OPTIONS).sequences
    with attach(model, EvenlySpaced(0.1)):
        plain = twin.generate(**prompt, **OPTIONS)
        assert used(plain) is None
        assert torch.equal(plain.sequences, expected)
        with attach(twin, Full()):
            assert isinstance(used(twin.generate(**prompt, **OPTIONS)), Full)
        assert isinstance(used(model.generate(**prompt, **OPTIONS)), EvenlySpaced)
    assert torch.equal(twin.generate(**prompt, **OPTIONS).sequences, expected)


def test_a_copy_made_inside(model: PreTrainedModel, prompt: BatchFeature) -> None:
    expected = model.generate(**prompt, **OPTIONS).sequences
    with attach(model, EvenlySpaced(0.1)):
        copied = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="for the very model attached"):
            copied.generate(**prompt, **OPTIONS)
        with pytest.raises(RuntimeError, match="copy of one that was attached"), attach(copied, Full()):
            pass
    copied.set_attn_implementation("sdpa")
    assert torch.equal(copied.generate(**prompt, **OPTIONS).sequences, expected)
    with attach(copied, Full()):
        assert isinstance(used(copied.generate(**prompt, **OPTIONS)), Full)


@pytest.mark.parametrize("how", ["forward", "module", "layers"])
def test_a_model_that_was_compiled(how: str, model: PreTrainedModel, prompt: BatchFeature) -> None:
    """It runs uncompiled inside the block, with a warning, and compiled again behind it."""
    with attach(model, EvenlySpaced(0.3)):
        expected = model.generate(**prompt, **OPTIONS).sequences
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif how == "module":
        model.compile(backend="eager")
    else:
        for layer in model.get_decoder().layers:
            layer.compile(backend="eager")
    compiled = [vars(m).get("forward", m._compiled_call_impl) for m in model.modules()]
    with pytest.warns(UserWarning, match="runs uncompiled inside attach"), attach(model, EvenlySpaced(0.3)):
        out = model.generate(**prompt, **OPTIONS)
        assert isinstance(used(out), EvenlySpaced)
        assert torch.equal(out.sequences, expected)
    assert [vars(m).get("forward", m._compiled_call_impl) for m in model.modules()] == compiled

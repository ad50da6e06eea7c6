"""A cache with room: the tail at a fixed address, its length on the device, and a decode step that is one and the same
program."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, Model, longer, prefill, step
from transformers import BatchFeature
from transformers.generation import CompileConfig

import kvcapsule.inference.cache as cache_module
from kvcapsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache, _valid
from kvcapsule.inference.tail import StaticTail
from kvcapsule.methods.method import Method
from kvcapsule.policy import RKV, Full, PostVisionAttention

ROOM = 24
TOKENS = torch.tensor([[40], [41], [42]])


@pytest.fixture
def attached(model: Model) -> Iterator[Model]:
    with attach(model):
        yield model


@pytest.fixture(params=["full", "attention", "kvcapsule", "transform", "cross-layer"])
def method(
    request: pytest.FixtureRequest,
    random_capsule: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
    random_cross_layer: Callable[..., Capsule],
) -> Method:
    made: dict[str, Callable[[], Method]] = {
        "full": Full,
        "attention": lambda: PostVisionAttention(0.2),
        "kvcapsule": lambda: random_capsule(0.25, 0.25, 49),
        "transform": lambda: random_transform(49, (16, 12), (24, 20)),
        "cross-layer": lambda: random_cross_layer(49, joint_heads=2),
    }
    return made[request.param]()


def both(model: Model, method: Method, batch: BatchFeature) -> tuple[CapsuleCache, CapsuleCache]:
    """A cache that grows and one with room, after prefill."""
    growing, static = CapsuleCache(model.config, method), CapsuleCache(model.config, method, room=ROOM)
    torch.testing.assert_close(prefill(model, batch, static), prefill(model, batch, growing), rtol=0, atol=0)
    return growing, static


def addresses(cache: CapsuleCache) -> list[int]:
    return [t.data_ptr() for layer in cache.layers for t in (*layer.tail.tensors(), layer.tail.count)]


def test_as_a_tail_that_grows(attached: Model, method: Method, mixed: BatchFeature) -> None:
    """Token by token, several at once (a later turn, in which they do not all see each other), and again; nothing moves
    in memory."""
    growing, static = both(attached, method, mixed)
    mask, places = mixed["attention_mask"], addresses(static)
    for tokens in (TOKENS, torch.tensor([[43, 44, 45]] * 3), torch.tensor([[46]] * 3)):
        mask = longer(mask, tokens.shape[1])
        torch.testing.assert_close(
            step(attached, static, tokens, mask), step(attached, growing, tokens, mask), rtol=0, atol=EXACT
        )
        assert int(static.get_seq_length()) == growing.get_seq_length() == mask.shape[1]
    assert addresses(static) == places
    assert static.bytes().visual == growing.bytes().visual


def test_padding_in_a_later_turn(attached: Model, mixed: BatchFeature) -> None:
    growing, static = both(attached, PostVisionAttention(0.2), mixed)
    mask = torch.cat([mixed["attention_mask"], torch.tensor([[1, 1], [0, 1], [1, 1]])], dim=1)
    tokens = torch.tensor([[43, 44]] * 3)
    torch.testing.assert_close(
        step(attached, static, tokens, mask), step(attached, growing, tokens, mask), rtol=0, atol=EXACT
    )
    mask = longer(mask, 1)
    torch.testing.assert_close(
        step(attached, static, TOKENS, mask), step(attached, growing, TOKENS, mask), rtol=0, atol=EXACT
    )


def test_rows_chosen_and_tokens_taken_back(attached: Model, mixed: BatchFeature) -> None:
    growing, static = both(attached, PostVisionAttention(0.2), mixed)
    mask, order = longer(mixed["attention_mask"], 1), torch.tensor([2, 0, 0])
    places = addresses(static)
    for cache in (growing, static):
        step(attached, cache, TOKENS, mask)
        step(attached, cache, TOKENS, longer(mask, 1))
        cache.crop(-1)
        cache.reorder_cache(order)
    assert addresses(static) == places
    mask = longer(mask[order], 1)
    torch.testing.assert_close(
        step(attached, static, TOKENS, mask), step(attached, growing, TOKENS, mask), rtol=0, atol=EXACT
    )
    for cache in (growing, static):
        cache.batch_select_indices(torch.tensor([1]))
    mask = longer(mask[1:2], 1)
    torch.testing.assert_close(
        step(attached, static, TOKENS[:1], mask), step(attached, growing, TOKENS[:1], mask), rtol=0, atol=EXACT
    )


@pytest.mark.parametrize("method", ["attention", "transform"], indirect=True)
def test_a_step_is_compiled_once_and_whole(model: Model, method: Method, mixed: BatchFeature) -> None:
    """transformers' generate compiles the decode step of a cache with room, as that of its own static cache: without a
    break, and once."""
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compile_config = CompileConfig(fullgraph=True, dynamic=False, backend=count, mode=None)
    compile_config._compile_all_devices = True
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    with attach(model, method), torch.no_grad():
        # First: whatever is made once must not wait for the compiled step.
        found = model.generate(**mixed, **options, cache_implementation="static", compile_config=compile_config)
        expected = model.generate(**mixed, **options)
    torch._dynamo.reset()
    vars(model).pop("_compiled_call", None)
    assert torch.equal(found, expected)
    assert len(graphs) == 1


def test_no_mask_of_full_length(attached: Model, mixed: BatchFeature, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask of a forward over segments is of the tail alone."""
    seen: list[Any] = []
    attend = cache_module.attend
    monkeypatch.setattr(cache_module, "attend", lambda *args: (seen.append(args[3]), attend(*args))[1])
    mask = torch.cat([mixed["attention_mask"], torch.tensor([[1, 1], [0, 1], [1, 1]])], dim=1)
    for cache, length in zip(both(attached, Full(), mixed), (2, ROOM), strict=True):
        seen.clear()
        step(attached, cache, torch.tensor([[43, 44]] * 3), mask)
        assert [tuple(visible.shape) for visible in seen] == [(3, 2, length)] * 4


def test_what_is_seen_without_a_mask() -> None:
    """By hand: three tokens written in a room of five, of which the last two ask; and a mask that covers what is
    written alone."""
    tail = StaticTail(torch.zeros(1, 1, 0, 2), torch.zeros(1, 1, 0, 2), room=5)
    tail.append(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2))
    assert tail.visible(None, 2).int().tolist() == [[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]]
    assert tail.visible(torch.tensor([[[[False, True, True]]]]), 1).int().tolist() == [[[0, 1, 1, 0, 0]]]


def test_padding_from_masks_of_any_form() -> None:
    """Two rows of three tokens, the first of the second padding; queries of padding see nothing."""
    wanted = torch.tensor([[1, 1, 1], [0, 1, 1]], dtype=torch.bool)
    seen = torch.ones(3, 3, dtype=torch.bool).tril() & wanted[:, None, None]
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (wanted.int(), seen, added, {"full_attention": seen, "sliding_attention": None}):
        assert torch.equal(_valid(mask, 2, 3), wanted)
    assert torch.equal(_valid(seen[1:], 2, 2), wanted[[1, 1], 1:]), "one mask for all rows, of the latest tokens"
    assert _valid(None, 2, 3) is None and _valid({"full_attention": None}, 2, 3) is None
    with pytest.raises(NotImplementedError, match="a mask of the type object"):
        _valid(object(), 2, 3)


def test_more_than_the_room(attached: Model, mixed: BatchFeature) -> None:
    cache = CapsuleCache(attached.config, Full(), room=2)
    prefill(attached, mixed, cache)
    with pytest.raises(ValueError, match="3 tokens do not fit into a tail of 2: make the CapsuleCache with more room"):
        step(attached, cache, torch.tensor([[43, 44, 45]] * 3), longer(mixed["attention_mask"], 3))


def test_what_a_static_cache_cannot_be(model: Model, mixed: BatchFeature) -> None:
    with pytest.raises(ValueError, match="room 0: give the tokens"):
        CapsuleCache(model.config, Full(), room=0)
    with pytest.raises(ValueError, match="RKV acts again while tokens are written"):
        CapsuleCache(model.config, RKV(), room=8)
    with attach(model, Full()):
        with pytest.raises(ValueError, match='"static" needs max_new_tokens'):
            model.generate(**mixed, cache_implementation="static")
        cache = CapsuleCache(model.config, Full(), room=8)
        prefill(model, mixed, cache)
        with pytest.raises(NotImplementedError, match="stays at its address"):
            cache.layers[0].offload()

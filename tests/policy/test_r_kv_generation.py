"""R-KV in generation: a long answer stays at the budget, beams, later turns, and beside a capsule."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.r_kv_rows import own
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import RKV, Full
from kvcapsule.policy.combine import Combined
from kvcapsule.policy.r_kv import PROMPT
from kvcapsule.segments.segment import Segment

# Generation


@contextmanager
def positions(model: LlavaForConditionalGeneration) -> Iterator[list[list[int]]]:
    """Position ids that the language model is given, forward by forward, of the first row."""
    seen: list[list[int]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"][0].tolist()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


class Watched(CapsuleCache):
    """Writes down what its layers hold at every forward."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.log: list[list[tuple[int, int, int]]] = []

    def begin_forward(self, *args: Any) -> None:
        super().begin_forward(*args)
        self.log.append([(written_rows(layer), layer.tail_length, layer.get_seq_length()) for layer in own(self)])


def written_rows(layer: CapsuleLayer) -> int:
    return sum(s.tokens for s in layer.text if s.tag != PROMPT)


def answer(
    model: LlavaForConditionalGeneration, batch: BatchFeature, method: Any, count: int, **options: Any
) -> tuple[torch.Tensor, Any]:
    with attach(model):
        cache = Watched(model.config, method)
        options = {"do_sample": False, "suppress_tokens": [model.config.image_token_id], **options}
        out = model.generate(**batch, **cache_argument(cache), max_new_tokens=count, min_new_tokens=count, **options)
    return out[:, batch["input_ids"].shape[1] :], cache


def test_a_long_answer_is_held_at_the_budget(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """300 tokens: beside the prompt, a layer never holds more than the budget and the buffer, while the model counts
    every token."""
    method = RKV(budget_tokens=48, buffer=32)
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    length = batch["input_ids"].shape[1]
    with positions(model) as counted:
        tokens, cache = answer(model, batch, method, 300)
    assert tokens.shape == (2, 300)
    stored = [[rows + tail for rows, tail, _ in step] for step in cache.log]
    assert max(map(max, stored)) == 48 + 32 - 1, "when the next token comes; with it the buffer is full and goes"
    assert all(rows <= 48 and tail < 32 for step in cache.log for rows, tail, _ in step)
    # 299 tokens go through the cache; the buffer fills nine times.
    assert [written_rows(layer) for layer in own(cache)] == [48] * 4
    assert [layer.tail_length for layer in own(cache)] == [299 - 9 * 32] * 4
    assert [step[0][2] for step in cache.log] == [0, *range(length, length + 299)]
    starts = [ids[-1] for ids in counted]
    assert starts == list(range(starts[0], starts[0] + 300))
    rows = 2 * 2 * 2 * 32 * 4  # batch, keys and values, KV heads, head dim, bytes
    after = cache.bytes()
    assert after.tail == 4 * (64 * rows + 2 * 4 * 8 * 32 * 4), "room for 64 tokens and the queries of 8"
    text = sum(s.tokens for layer in own(cache) for s in layer.text)
    assert after.text == pytest.approx(text * rows, rel=0.02)


def test_an_answer_within_the_budget_is_the_full_caches(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."), (0, "What now?"))
    expected, _ = answer(model, batch, Full(), 30)
    for method in (
        RKV(budget_tokens=64, buffer=9),
        RKV(budget_tokens=500, buffer=9, scope="all"),
        Combined(Full(), RKV(64, 9)),
    ):
        found, cache = answer(model, batch, method, 30)
        assert torch.equal(found, expected)
        assert own(cache)[0].tail_length == 29 - 27
    cut, _ = answer(model, batch, RKV(budget_tokens=12, buffer=9), 30)
    assert not torch.equal(cut, expected)


@pytest.mark.parametrize("scope", ["generated", "all"])
def test_a_batch_answers_as_one_by_one(
    scope: str, model64: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]
) -> None:
    """Rows with one, two and no images, padded on the left; and a second run is the first."""
    method = RKV(budget_tokens=14, buffer=8, scope=scope)
    prompts = [(1, "Read line 2."), (2, "Transcribe both pages, the second one first, please."), (0, "What now?")]
    batch = make_batch(*prompts)
    batch["pixel_values"] = batch["pixel_values"].double()
    together, cache = answer(model64, batch, method, 26)
    assert torch.equal(answer(model64, batch, method, 26)[0], together)
    images = 0
    for row, one in enumerate(prompts):
        single = make_batch(one)
        if one[0]:
            single["pixel_values"] = batch["pixel_values"][images : images + one[0]]
        images += one[0]
        alone, alone_cache = answer(model64, single, method, 26)
        assert torch.equal(alone[0], together[row])
        for layer, alone_layer in zip(own(cache), own(alone_cache), strict=True):
            for head in range(2):
                for held in ("visual", "text"):
                    mine, theirs = (content(getattr(x, held), r, head) for x, r in ((layer, row), (alone_layer, 0)))
                    torch.testing.assert_close(mine, theirs)


def content(segments: list[Segment], row: int, head: int) -> torch.Tensor:
    """All keys that a head of a row stores."""
    found = [torch.zeros(0, 32, dtype=torch.float64)]
    for s in segments:
        assert isinstance(s.keys, torch.Tensor)
        for entry in (s.owner == row).nonzero()[:, 0].tolist():
            if s.head is None or int(s.head[entry]) == head:
                keys = s.keys[entry, head if s.head is None else 0]
                found.append(keys if s.mask is None else keys[s.mask[entry]])
    return torch.cat(found)


def test_beams(model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature]) -> None:
    """Within the budget the beams are the full cache's; beyond it they go on, and hold no more than it."""
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    expected, _ = answer(model, batch, Full(), 24, num_beams=2)
    found, _ = answer(model, batch, RKV(budget_tokens=64, buffer=8), 24, num_beams=2)
    assert torch.equal(found, expected)
    cut, cache = answer(model, batch, RKV(budget_tokens=12, buffer=8), 24, num_beams=2)
    assert [written_rows(layer) for layer in own(cache)] == [12] * 4
    assert torch.equal(cut, answer(model, batch, RKV(budget_tokens=12, buffer=8), 24, num_beams=2)[0])


def test_later_turns(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature], processor: Any, images: Any
) -> None:
    """Text of a later turn counts as written; an image closes the buffer early, and still no more is held than budget
    and buffer."""
    method = RKV(budget_tokens=24, buffer=16)
    turn = {
        "max_new_tokens": 12,
        "min_new_tokens": 12,
        "do_sample": False,
        "suppress_tokens": [model.config.image_token_id],
    }
    with attach(model):
        cache = CapsuleCache(model.config, method)
        said = model.generate(**make_batch((1, "Read line 2.")), **cache_argument(cache), **turn)
        first = [list(layer.text) for layer in own(cache)]
        assert [layer.tail_length for layer in own(cache)] == [11] * 4

        def go_on(words: str, *pages: Any) -> torch.Tensor:
            more = processor(
                images=list(pages) or None,
                text=[f"<|user|>{'<image>' * len(pages)}{words}<|assistant|>"],
                return_tensors="pt",
            )
            ids = torch.cat([said, more["input_ids"]], dim=1)
            inputs = {"pixel_values": more["pixel_values"]} if pages else {}
            return model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), **inputs, **cache_argument(cache), **turn
            )

        said = go_on("And line 3, and after it all of the lines that are left on this page, please?")
        for layer, before in zip(own(cache), first, strict=True):
            assert layer.text[: len(before)] == before
            assert written_rows(layer) + layer.tail_length <= 24 + 16
            assert layer.tail.keys.shape[2] <= 16 + 64, "the buffer that a long turn took is given back"
        for number in range(5):
            said = go_on("And here?", images[number])
            for layer in own(cache):
                assert written_rows(layer) + layer.tail_length < 24 + 16 + method.window
                assert layer.get_seq_length() == said.shape[1] - 1
                assert sum(s.tag == PROMPT for s in layer.text) == len(first[0]) + number + 1


def test_beside_a_capsule(
    model: LlavaForConditionalGeneration,
    make_batch: Callable[..., BatchFeature],
    random_transform: Callable[..., Capsule],
) -> None:
    """The capsule stores the image as it does alone, and what is written stays at the budget."""
    capsule, batch = random_transform(tile=49), make_batch((1, "Read line 2."), (1, "Transcribe the page."))
    _, alone = answer(model, batch, capsule, 70)
    _, paired = answer(model, batch, Combined(capsule, RKV(budget_tokens=24, buffer=16)), 70)
    assert paired.bytes().visual == alone.bytes().visual > 0
    assert max(rows + tail for step in paired.log for rows, tail, _ in step) == 24 + 16 - 1
    assert [written_rows(layer) for layer in own(paired)] == [24] * 4
    assert paired.bytes().total < alone.bytes().total


def test_beside_a_capsule_that_keeps_everything_it_is_itself(
    model: LlavaForConditionalGeneration, make_batch: Callable[..., BatchFeature], identity: Callable[..., Capsule]
) -> None:
    batch, method = make_batch((1, "Read line 2."), (2, "Transcribe the page.")), RKV(budget_tokens=24, buffer=16)
    expected, _ = answer(model, batch, method, 60)
    assert torch.equal(answer(model, batch, Combined(identity(49), method), 60)[0], expected)

"""Spans given out of a cache and taken in by another: generation goes on as if the prompt had been read there."""

import copy
from typing import Any

import pytest
import torch
from support import tiny_vlm
from support.builders import EVERY_FAMILY, cross_layer_capsule, identity_capsule, transform_capsule
from support.family_models import Built, Witness, built
from support.span_prompts import LLAVA, NEW, QWEN, TILE, Prompt, cut, prompt

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.stored_span import StoredSpan, from_bytes, to_bytes
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.segments.segment import Segment


@pytest.fixture(params=[LLAVA, QWEN], ids=["llava", "qwen2_vl"])
def model(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=EVERY_FAMILY, ids=str)
def family(request: pytest.FixtureRequest) -> Any:
    return EVERY_FAMILY[request.param]


def through_bytes(spans: list[StoredSpan], capsule: Capsule) -> list[StoredSpan]:
    return [from_bytes(to_bytes(span, capsule), capsule) for span in spans]


def new_cache(of: Built, capsule: Any, spans: list[StoredSpan], **options: Any) -> CapsuleCache:
    cache = CapsuleCache(of.model.config, capsule, **options)
    cache.take_in(spans)
    return cache


def segments(cache: CapsuleCache) -> list[Segment]:
    return [s for layer in cache.capsule_layers() for s in (*layer.visual, *layer.text)]


def assert_same_answer(out: Any, expected: Any) -> None:
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.logits) == NEW
    assert all(map(torch.equal, out.logits, expected.logits))


class TestAnswers:
    """The same tokens and logits, bit by bit."""

    def test_every_family(self, model: int, family: Any) -> None:
        asked = prompt(model, 0, 1)
        capsule = family(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
            taken = new_cache(asked.of, capsule, through_bytes(cache.stored_spans(), capsule))
            assert taken.get_seq_length() == cache.get_seq_length() == asked.beginning["input_ids"].shape[1]
            for one, other in zip(segments(cache), segments(taken), strict=True):
                assert (one.each_row, one.tag, one.tokens) == (other.each_row, other.tag, other.tokens)
                assert all(map(torch.equal, one.entry_tensors(), other.entry_tensors()))
            assert taken.bytes() == cache.bytes()
            expected = asked.generate(cache)
            assert_same_answer(asked.generate(taken), expected)

    def test_the_answer_tells_something(self, model: int) -> None:
        """The tests above could fail: other images, and spans whose numbers were changed, give other logits."""
        asked, other = prompt(model, 0, 1), prompt(model, 2, 3)
        capsule = transform_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            cache, another = (p.read(CapsuleCache(p.of.model.config, capsule)) for p in (asked, other))
            spans, expected = cache.stored_spans(), asked.generate(cache)
            assert cache.stored_spans()[0].header == another.stored_spans()[0].header
            out = asked.generate(new_cache(asked.of, capsule, another.stored_spans()))
            assert not torch.equal(out.logits[0], expected.logits[0])
            rows: Any = spans[1].visual[1][0].keys
            rows.packed[0, 0] ^= 255
            out = asked.generate(new_cache(asked.of, capsule, spans))
            assert not torch.equal(out.logits[0], expected.logits[0])

    @pytest.mark.parametrize("tile", [1, 8, 16, 100])
    def test_tiles_that_fit_and_tiles_that_do_not(self, model: int, tile: int) -> None:
        """No rest, a rest, and spans that fill no tile at all, beside spans that do."""
        asked = prompt(model, 0, 1)
        capsule = transform_capsule(asked.of.geometry, tile=tile)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
            spans = through_bytes(cache.stored_spans(), capsule)
            assert [span.header.tiles for span in spans] == [span.header.length // tile for span in spans]
            assert_same_answer(asked.generate(new_cache(asked.of, capsule, spans)), asked.generate(cache))

    @pytest.mark.parametrize("align", [2, 4, 8])
    def test_tiles_at_blocks(self, model: int, align: int) -> None:
        """Raw rows at both ends of a span, by where in its prompt it lies."""
        asked = prompt(model, 0, 1)
        capsule = transform_capsule(asked.of.geometry, tile=8, align=align)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
            spans = through_bytes(cache.stored_spans(), capsule)
            for header in (span.header for span in spans):
                before = -header.start % align
                assert header.tiles == max(0, header.length - before) // 8
                assert header.rest == header.length - header.tiles * 8
            assert any(span.header.start % align for span in spans) and any(span.header.tiles for span in spans)
            taken = new_cache(asked.of, capsule, spans)
            for one, other in zip(segments(cache), segments(taken), strict=True):
                assert all(map(torch.equal, one.entry_tensors(), other.entry_tensors()))
            expected = asked.generate(cache)
            assert_same_answer(asked.generate(taken), expected)
            # Taken in, they are given out again as they were.
            again = new_cache(asked.of, capsule, spans).stored_spans()
            assert [to_bytes(span, capsule) for span in again] == [to_bytes(span, capsule) for span in spans]

    def test_one_span_of_several(self, model: int) -> None:
        """A cache of the first alone is that of a prompt which ends with it."""
        asked, longer = prompt(model, 0), prompt(model, 0, 1)
        capsule = cross_layer_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
            first = longer.read(CapsuleCache(asked.of.model.config, capsule)).stored_spans()[:1]
            taken = new_cache(asked.of, capsule, through_bytes(first, capsule))
            assert taken.get_seq_length() == cache.get_seq_length() == first[0].header.end
            out, expected = asked.generate(taken), asked.generate(cache)
        assert torch.equal(out.sequences, expected.sequences)
        torch.testing.assert_close(out.logits[0], expected.logits[0], rtol=0, atol=1e-3)

    def test_fixed_capacity(self) -> None:
        asked = prompt(LLAVA, 0, 1)
        capsule = transform_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule, tail_capacity=16))
            taken = new_cache(asked.of, capsule, cache.stored_spans(), tail_capacity=16)
            assert_same_answer(asked.generate(taken), asked.generate(cache))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_precisions(self, dtype: torch.dtype) -> None:
        asked = prompt(LLAVA, 0, 1)
        of = asked.of._replace(model=copy.deepcopy(asked.of.model).to(dtype))
        beginning = {n: x.to(dtype) if x.is_floating_point() else x for n, x in asked.beginning.items()}
        asked = Prompt(of, beginning, asked.rest)
        for name in ("cross-layer", "kvcapsule", "compact in 3 bits"):
            capsule = EVERY_FAMILY[name](of.geometry, tile=TILE)
            with attach(of.model):
                cache = asked.read(CapsuleCache(of.model.config, capsule))
                spans = through_bytes(cache.stored_spans(), capsule)
                assert spans[0].header.kv_dtype == dtype
                assert_same_answer(asked.generate(new_cache(of, capsule, spans)), asked.generate(cache))

    def test_positions_are_of_this_prompt_and_not_of_the_last(self) -> None:
        """A model with M-RoPE keeps how far positions lie behind the count of tokens."""
        asked = prompt(QWEN, 0, 1)
        capsule = transform_capsule(asked.of.geometry, tile=TILE)
        plain = tiny_vlm.batch(asked.of.tiny, [1, 2, 3])
        options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": tiny_vlm.PAD}
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
            taken = new_cache(asked.of, capsule, cache.stored_spans())
            expected = asked.generate(cache)
            asked.of.model.generate(**plain, **options)
            with pytest.raises(ConfigError, match="image_grid_thw"):
                asked.generate(taken, image_grid_thw=None)
            assert_same_answer(asked.generate(taken), expected)
            assert not taken.taken_in


class TestGivingOut:
    """Which entries are of which span."""

    def test_by_row_of_a_padded_batch(self, model: int, family: Any) -> None:
        """Each row's spans are those of its prompt alone."""
        of = built(model)
        prompts = [[5, 6, of.tiny.picture(0), 7, of.tiny.picture(1)], [3, of.tiny.picture(1)], [4, 4, 4]]
        capsule = family(of.geometry, tile=TILE)
        with attach(of.model):
            caches = [CapsuleCache(of.model.config, capsule) for _ in range(4)]
            alone = [cut(tiny_vlm.batch(of.tiny, row)) if row is not prompts[2] else None for row in prompts]
            for cache, inputs in zip(caches, [cut(tiny_vlm.batch(of.tiny, *prompts)), *alone], strict=True):
                if inputs is not None:
                    Prompt(of, inputs, []).read(cache)
        assert caches[0].stored_spans(2) == []
        for row, count in enumerate((2, 1)):
            ours, theirs = caches[0].stored_spans(row), caches[1 + row].stored_spans()
            assert [s.header for s in ours] == [s.header for s in theirs]
            assert len(ours) == count
            for one, other in zip(ours, theirs, strict=True):
                for layer in one.header.layers:
                    for s, t in zip(one.text[layer], other.text[layer], strict=True):
                        torch.testing.assert_close(s.keys, t.keys, rtol=0, atol=1e-4)
                        torch.testing.assert_close(s.values, t.values, rtol=0, atol=1e-4)
                    assert [s.tokens for s in one.visual[layer]] == [s.tokens for s in other.visual[layer]]
                assert len(to_bytes(one, capsule)) == len(to_bytes(other, capsule))
        with pytest.raises(ConfigError, match="row 3 of a cache of 3 rows"):
            caches[0].stored_spans(3)

    def test_rows_that_moved(self, model: int, family: Any) -> None:
        """Beam search selects rows; each takes its spans along."""
        of = built(model)
        prompts = [[5, 6, of.tiny.picture(0), 7, of.tiny.picture(1)], [3, of.tiny.picture(1)]]
        capsule = family(of.geometry, tile=TILE)
        with attach(of.model):
            cache = Prompt(of, cut(tiny_vlm.batch(of.tiny, *prompts)), []).read(CapsuleCache(of.model.config, capsule))
        before = [[to_bytes(s, capsule) for s in cache.stored_spans(row)] for row in (0, 1)]
        assert before[0] != before[1]
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 2, 0]))
        after = [[to_bytes(s, capsule) for s in cache.stored_spans(row)] for row in range(3)]
        assert after == [before[0], before[0], before[1]]
        copied = copy.deepcopy(cache)
        copied.batch_select_indices(torch.tensor([2]))
        assert [to_bytes(s, capsule) for s in copied.stored_spans()] == before[1]
        assert len(cache.stored_spans()) == 2

    @pytest.mark.parametrize("rows", [1, 2])
    def test_later_turns(self, rows: int, family: Any) -> None:
        """Text that was written between two images goes with the second."""
        of = built(LLAVA)
        capsule = family(of.geometry, tile=TILE)
        first = [[5, 6, of.tiny.picture(0), 8], [3, of.tiny.picture(1)]][:rows]
        second = [[1, of.tiny.picture(2), 9, of.tiny.picture(3)], [2, 2, 2, of.tiny.picture(4)]][:rows]
        answer = {"input_ids": torch.tensor([[21, 22], [23, 24]])[:rows]}
        cache, mask = CapsuleCache(of.model.config, capsule), torch.ones(rows, 0, dtype=torch.int64)
        with attach(of.model), torch.no_grad():
            for batch in (tiny_vlm.batch(of.tiny, *first), answer, cut(tiny_vlm.batch(of.tiny, *second))):
                new = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
                mask = torch.cat([mask, new], dim=1)
                positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -new.shape[1] :]
                of.model(**{**batch, "attention_mask": mask, "position_ids": positions, **cache_argument(cache)})
        spans = cache.stored_spans()
        assert [(s.header.text, s.header.start) for s in spans] == [(3, 3), (6, 25), (3, 44)]
        assert int(mask[0].sum()) == spans[-1].header.end
        if rows == 2:
            assert [(s.header.text, s.header.start) for s in cache.stored_spans(1)] == [(2, 2), (7, 25)]
        taken = new_cache(of, capsule, through_bytes(spans, capsule))
        assert taken.get_seq_length() == 60
        assert [to_bytes(s, capsule) for s in taken.stored_spans()] == [to_bytes(s, capsule) for s in spans]
        if rows == 1:
            # One goes on as the other: the text behind the last image, then a new one.
            picture = cut(tiny_vlm.batch(of.tiny, [7, of.tiny.picture(5)]))
            new_image = {name: picture[name] for name in ("input_ids", "pixel_values")}
            logits = []
            with attach(of.model), torch.no_grad():
                for one in (cache, taken):
                    logits.append(
                        of.model(input_ids=torch.tensor([[tiny_vlm.END, 31]]), **cache_argument(one)).logits[:, -1]
                    )
                    of.model(**new_image, **cache_argument(one))
                    last = one.stored_spans()[3]
                    assert (last.header.text, last.header.start, one.get_seq_length()) == (4, 64, 80)
            torch.testing.assert_close(*logits, rtol=0, atol=1e-3)

    def test_filled_from_recorded_prefills(self) -> None:
        asked = prompt(LLAVA, 0, 1)
        capsule = cross_layer_capsule(asked.of.geometry, tile=TILE)
        witness = Witness()
        with attach(asked.of.model):
            asked.read(CapsuleCache(asked.of.model.config, witness))
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
        filled = CapsuleCache(asked.of.model.config, capsule)
        filled.fill(witness.seen)
        assert [to_bytes(s, capsule) for s in filled.stored_spans()] == [
            to_bytes(s, capsule) for s in cache.stored_spans()
        ]
        filled.reset()
        filled.fill(witness.seen)
        assert len(filled.stored_spans()) == 2

    def test_a_pending_prefill_is_compressed(self) -> None:
        """Assisted decoding leaves the prompt uncompressed until the next step."""
        asked = prompt(LLAVA, 0)
        capsule = transform_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            plain = asked.read(CapsuleCache(asked.of.model.config, capsule))
            cache = CapsuleCache(asked.of.model.config, capsule)
            cache.activate_past_recording()
            asked.read(cache)
        assert [to_bytes(s, capsule) for s in cache.stored_spans()] == [
            to_bytes(s, capsule) for s in plain.stored_spans()
        ]

    def test_none_and_empty(self) -> None:
        of = built(LLAVA)
        cache = CapsuleCache(of.model.config, identity_capsule(of.geometry, tile=TILE))
        with pytest.raises(ConfigError, match="row 0 of a cache of 0 rows"):
            cache.stored_spans()
        with attach(of.model), torch.no_grad():
            of.model(**tiny_vlm.batch(of.tiny, [1, 2, 3]), **cache_argument(cache))
        assert cache.stored_spans() == []

    def test_what_a_cache_gives_out_is_its_own(self) -> None:
        """Nothing that was given out lies in the cache's memory."""
        asked = prompt(LLAVA, 0)
        capsule = identity_capsule(asked.of.geometry, tile=TILE)
        with attach(asked.of.model):
            cache = asked.read(CapsuleCache(asked.of.model.config, capsule))
        stored = {t.untyped_storage().data_ptr() for s in segments(cache) for t in s.entry_tensors()}
        (span,) = cache.stored_spans()
        found = [
            t for part in (span.visual, span.text) for list_ in part.values() for s in list_ for t in s.entry_tensors()
        ]
        assert found and not stored & {t.untyped_storage().data_ptr() for t in found}

"""transformers' own cache tests, re-stated for CapsuleCache with methods that keep everything and with some that do
not.

From tests/utils/test_cache_utils.py and tests/generation/test_utils.py of transformers; docs/generation.md lists those
that do not apply. Crop, reset and chosen rows are in test_cache_interface.py, beams and samples in test_cache.py.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, Model, assert_same, longer, prefill, run, step
from transformers import BatchFeature, DynamicCache

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument, output_cache
from kvcapsule.methods.method import Method
from kvcapsule.policy import EvenlySpaced, Full, Quantized

Batch = Callable[..., BatchFeature]
METHODS = ["full", "identity", "spaced", "quantized", "kvcapsule", "mlp", "transform", "cross-layer", "few bits"]


@pytest.fixture(scope="module", params=METHODS)
def method(
    request: pytest.FixtureRequest,
    identity: Callable[..., Capsule],
    random_capsule: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
    random_cross_layer: Callable[..., Capsule],
) -> Method:
    made: dict[str, Callable[[], Method]] = {
        "full": Full,
        "identity": lambda: identity(50),
        "spaced": lambda: EvenlySpaced(0.25),
        "quantized": lambda: Quantized(2),
        "kvcapsule": random_capsule,
        "mlp": lambda: random_capsule(key_decoder="mlp", hidden=8),
        "transform": random_transform,
        "cross-layer": random_cross_layer,
        "few bits": lambda: random_capsule(latent_bits=3),
    }
    return made[request.param]()


@pytest.fixture(scope="module")
def batch(make_batch: Batch) -> BatchFeature:
    return make_batch((1, "Read line 2."), (2, "Transcribe the page."), (0, "What is the number beside the owl?"))


@pytest.fixture
def attached(model: Model) -> Iterator[Model]:
    with attach(model):
        yield model


def generate(model: Model, batch: BatchFeature, cache: CapsuleCache, greedy: dict[str, Any], new: int = 8) -> Any:
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    return model.generate(**batch, **cache_argument(cache), **{**greedy, **lengths})


class TestGeneration:
    def test_continue_from_past_key_values(
        self, method: Method, attached: Model, batch: BatchFeature, greedy: dict[str, Any]
    ) -> None:
        """test_generate_continue_from_past_key_values: three tokens and then five are eight."""
        whole = generate(attached, batch, CapsuleCache(attached.config, method), greedy)
        cache = CapsuleCache(attached.config, method)
        first = generate(attached, batch, cache, greedy, new=3)
        rest = BatchFeature({"input_ids": first.sequences, "attention_mask": longer(batch["attention_mask"], 3)})
        second = generate(attached, rest, cache, greedy, new=5)
        assert torch.equal(second.sequences, whole.sequences)
        for ours, theirs in zip(first.logits + second.logits, whole.logits, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)

    def test_extra_left_padding(
        self, method: Method, attached: Model, make_batch: Batch, greedy: dict[str, Any]
    ) -> None:
        """test_cache_extra_left_padding."""
        one = make_batch((1, "Read line 2."))
        padding = {
            "input_ids": torch.zeros(1, 37, dtype=torch.int64),
            "attention_mask": torch.zeros(1, 37, dtype=torch.int64),
        }
        padded = BatchFeature({k: torch.cat([padding[k], v], dim=1) if k in padding else v for k, v in one.items()})
        plain = generate(attached, one, CapsuleCache(attached.config, method), greedy)
        out = generate(attached, padded, CapsuleCache(attached.config, method), greedy)
        assert torch.equal(out.sequences[:, -8:], plain.sequences[:, -8:])
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), rtol=0, atol=EXACT)
        assert output_cache(out).bytes() == output_cache(plain).bytes()

    def test_copied_prompt(self, method: Method, attached: Model, make_batch: Batch, greedy: dict[str, Any]) -> None:
        """test_cache_copy: an image is read once, and two questions go on from copies of its cache."""
        prompt = make_batch((1, "Read line 2."))
        asked, cache = [], CapsuleCache(attached.config, method)
        prefill(attached, prompt, cache)
        held = cache.bytes()
        for token in (40, 41):
            ids = torch.cat([prompt["input_ids"], torch.tensor([[token]])], dim=1)
            question = BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            twin = copy.deepcopy(cache)
            assert twin.bytes() == held
            assert twin.method is method
            asked.append(generate(attached, question, twin, greedy))
        assert cache.bytes() == held
        assert cache.get_seq_length() == prompt["input_ids"].shape[1]
        # Then the original itself, as the second question: the copies have left it as it was.
        assert_same(generate(attached, question, cache, greedy), asked[1], atol=0)
        assert not torch.equal(asked[0].logits[0], asked[1].logits[0])

    def test_copies_share_the_parameters(
        self, attached: Model, batch: BatchFeature, random_capsule: Callable[..., Capsule]
    ) -> None:
        cache = CapsuleCache(attached.config, random_capsule())
        prefill(attached, batch, cache)
        twin = copy.deepcopy(cache)
        for ours, theirs in zip(cache.layers, twin.layers, strict=True):
            for one, other in zip(ours.visual, theirs.visual, strict=True):
                assert [id(t) for t in one.parameter_tensors()] == [id(t) for t in other.parameter_tensors()]
                assert {t.data_ptr() for t in one.entry_tensors()}.isdisjoint(
                    t.data_ptr() for t in other.entry_tensors()
                )


class TestTensors:
    def logits(self, model: Model, cache: CapsuleCache, tokens: list[int], mask: torch.Tensor) -> torch.Tensor:
        return step(model, cache, torch.tensor(tokens)[:, None], longer(mask, 2))

    def filled(self, model: Model, batch: BatchFeature, method: Method) -> CapsuleCache:
        """A prompt and one token behind it."""
        cache = CapsuleCache(model.config, method)
        prefill(model, batch, cache)
        step(model, cache, torch.tensor([[40], [41], [42]]), longer(batch["attention_mask"], 1))
        return cache

    @pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 0]], ids=str)
    def test_reorder_cache(self, order: list[int], method: Method, attached: Model, batch: BatchFeature) -> None:
        """test_reorder_cache_retrocompatibility: row i goes on as row order[i] would have."""
        mask = batch["attention_mask"]
        cache = self.filled(attached, batch, method)
        plain = self.logits(attached, copy.deepcopy(cache), [50, 51, 52], mask)
        cache.reorder_cache(torch.tensor(order))
        out = self.logits(attached, cache, [50 + row for row in order], mask[order])
        torch.testing.assert_close(out, plain[order], rtol=0, atol=EXACT)

    def test_sequence_length(self, method: Method, attached: Model, batch: BatchFeature) -> None:
        """Lengths and offsets are the DynamicCache's, whatever is stored; the mask ends where its does, and is of the
        tail alone."""
        own, mask = DynamicCache(config=attached.config), batch["attention_mask"]
        cache = CapsuleCache(attached.config, method)
        for fed, past in ((False, cache), (True, cache)):
            if fed:
                prefill(attached, batch, own)
                prefill(attached, batch, past)
                for each in (own, past):
                    step(attached, each, torch.tensor([[40], [41], [42]]), longer(mask, 1))
                    each.crop(-1)
            for layer in range(4 if fed else 0):
                assert past.get_seq_length(layer) == own.get_seq_length(layer) == past.get_query_offset(layer)
                assert past.get_mask_sizes(3, layer) == (3, mask.shape[1])
                assert own.get_mask_sizes(3, layer) == (3 + mask.shape[1], 0)
            assert past.get_seq_length() == own.get_seq_length() == (mask.shape[1] if fed else 0)
            assert (past.get_max_length(), past.is_compileable, len(past)) == (-1, False, 4)

    def test_early_initialization(self, attached: Model, batch: BatchFeature) -> None:
        cache = CapsuleCache(attached.config, Full())
        cache.early_initialization(
            batch_size=3, num_heads=2, head_dim=32, dtype=torch.float32, device=torch.device("cpu")
        )
        assert cache.is_initialized
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(
            prefill(attached, batch, cache),
            prefill(attached, batch, DynamicCache(config=attached.config)),
            rtol=0,
            atol=0,
        )

    def test_moved_away_and_back(self, method: Method, attached: Model, batch: BatchFeature) -> None:
        """Everything that is stored for the sequences moves, here to "meta", which holds no data: so it is kept aside
        meanwhile."""
        cache = self.filled(attached, batch, method)
        before, parameters = (
            cache.bytes(),
            [id(t) for layer in cache.layers for s in layer.visual for t in s.parameter_tensors()],
        )
        aside = copy.deepcopy(cache)
        for layer in cache.layers:
            layer._move(torch.device("meta"))
            stored = [t for s in (*layer.visual, *layer.text) for t in s.entry_tensors()]
            assert all(t.is_meta for t in (*stored, *layer.tail.tensors()))
        assert [id(t) for layer in cache.layers for s in layer.visual for t in s.parameter_tensors()] == parameters
        for layer, kept in zip(aside.layers, cache.layers, strict=True):
            assert [t.shape for s in (*layer.visual, *layer.text) for t in s.entry_tensors()] == [
                t.shape for s in (*kept.visual, *kept.text) for t in s.entry_tensors()
            ]
        assert aside.bytes() == before

    def test_offload(
        self, method: Method, attached: Model, batch: BatchFeature, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between turns a cache can lie in the host's memory; the next token fetches it, layer by layer."""
        cache = self.filled(attached, batch, method)
        expected = self.logits(attached, copy.deepcopy(cache), [50, 51, 52], batch["attention_mask"])
        for index in range(4):
            cache.offload(index)
        moves = []
        for layer in cache.layers:
            # On a machine whose only device is the host: as if the layer's had been another.
            fetch = layer._move
            monkeypatch.setattr(
                layer,
                "_move",
                lambda device, i=layer.index, fetch=fetch: (moves.append((i, device.type)), fetch(device)),
            )
            monkeypatch.setattr(layer, "device", torch.device("cpu", 0))
        torch.testing.assert_close(
            self.logits(attached, cache, [50, 51, 52], batch["attention_mask"]), expected, rtol=0, atol=0
        )
        assert moves == [(i, "cpu") for i in range(4)]


def test_batched_generation_is_that_of_the_full_cache(
    model: Model, batch: BatchFeature, greedy: dict[str, Any]
) -> None:
    """test_cache_batched, test_dynamic_cache_hard: a sampled answer of 40 tokens to a padded batch."""
    options = {**greedy, "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": True}
    torch.manual_seed(0)
    expected = model.generate(**batch, **options)
    torch.manual_seed(0)
    assert_same(run(model, Full(), batch, **options), expected)

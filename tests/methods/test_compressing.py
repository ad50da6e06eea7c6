"""Every method that loses something, through every property of a CapsuleCache."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.run_vlm import EXACT, MIXED, assert_same, in_dtype, prefill, run
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import output_cache
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, CompressionPass, Method
from kvcapsule.policy import EvenlySpaced, PostVisionAttention, Quantized
from kvcapsule.segments.segment import Segment

Batch = Callable[..., BatchFeature]
Model = LlavaForConditionalGeneration

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
    """So many bytes of codes or rows for each tile; tiles' frames and owners are common to all layers; what fills no
    tile is raw."""
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


COMPRESSING: dict[str, tuple[Callable[[Any, Any, Any], Method], int]] = {
    "post-vision-attention 0.4": (lambda *_: PostVisionAttention(0.4), row_bytes(3 * 78, 2)),
    "evenly-spaced 0.4": (lambda *_: EvenlySpaced(0.4), row_bytes(3 * 78, 2)),
    "quantized 2": (lambda *_: Quantized(2), code_bytes(2)),
    "quantized 4": (lambda *_: Quantized(4), code_bytes(4)),
    "quantized 8": (lambda *_: Quantized(8), code_bytes(8)),
    "kvcapsule 0.25": (lambda capsule, *_: capsule(0.25, 0.25, 49), capsule_bytes(13, 13, 49)),
    "kvcapsule 0.1 and 0.4, tile 50": (lambda capsule, *_: capsule(0.1, 0.4, 50), capsule_bytes(5, 20, 50)),
    "kvcapsule with mlp": (
        lambda capsule, *_: capsule(0.25, 0.25, 49, key_decoder="mlp", hidden=8),
        capsule_bytes(13, 13, 49),
    ),
    "kvcapsule in 3 bits": (lambda capsule, *_: capsule(0.25, 0.25, 49, latent_bits=3), latent_bytes(13, 3, 49)),
    "transform, tile 50": (
        lambda _, transform, cross: transform(50, (16, 12), (24, 20)),
        transform_bytes((16, 12), (24, 20), 50),
    ),
    "transform of all heads": (
        lambda _, transform, cross: transform(49, (16, 48), (24, 20), joint_heads=2),
        transform_bytes((16, 48), (24, 20), 49, joint=2),
    ),
    "cross-layer": (lambda _, transform, cross: cross(49, 16, 24, joint_layers=4), tile_bytes(H * 2 * 24 * 3 // L, 49)),
}


@pytest.fixture(scope="module", params=COMPRESSING)
def compressed(
    request: pytest.FixtureRequest,
    random_capsule: Callable[..., Capsule],
    random_transform: Callable[..., Capsule],
    random_cross_layer: Callable[..., Capsule],
    model: Model,
    mixed: BatchFeature,
    greedy: dict[str, Any],
) -> tuple[Method, int, Any]:
    """A method, the bytes that it promises for the mixed batch, and its answer."""
    build, promised = COMPRESSING[request.param]
    method = build(random_capsule, random_transform, random_cross_layer)
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

    def test_bytes_are_as_promised(
        self, compressed: tuple[Method, int, Any], mixed: BatchFeature, model: Model
    ) -> None:
        _, promised, out = compressed
        held = output_cache(out).bytes()
        assert held.visual == promised
        assert held.other == 0
        assert held.tail == L * 2 * H * D * FLOAT * 64 * 3
        text = int(mixed["attention_mask"].sum()) - 3 * T
        assert row_bytes(text, 3) <= held.text <= 1.25 * row_bytes(text, 3)
        assert held.total == held.visual + held.text + held.tail

    def test_batch_is_one_by_one(
        self,
        compressed: tuple[Method, int, Any],
        model64: Model,
        mixed: BatchFeature,
        processor: Any,
        images: Any,
        greedy: dict[str, Any],
    ) -> None:
        """In float64: in float32, a last bit of a key can turn a code into its neighbour."""
        method, first, tokens = compressed[0], 0, 4
        options = {**greedy, "max_new_tokens": tokens, "min_new_tokens": tokens}
        out = run(model64, method, in_dtype(mixed, torch.float64), **options)
        for row, (count, words) in enumerate(MIXED):
            text = f"<|user|>{'<image>' * count}{words}<|assistant|>"
            alone = in_dtype(
                processor(images=images[first : first + count] or None, text=text, return_tensors="pt"), torch.float64
            )
            first += count
            one = run(model64, method, alone, **options)
            assert torch.equal(one.sequences[0, -tokens:], out.sequences[row, -tokens:])
            for ours, theirs in zip(one.logits, out.logits, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=1e-6)

    def test_deterministic(
        self, compressed: tuple[Method, int, Any], model: Model, mixed: BatchFeature, greedy: dict[str, Any]
    ) -> None:
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
        assert_same(
            run(model, compressed[0], batch, **options),
            run(model, _WrittenOut(compressed[0]), batch, **options),
            atol=2e-5,
        )


class _WrittenOut(Method):
    """A method whose visual segments are stored as the full keys and values that they stand for."""

    def __init__(self, method: Method) -> None:
        self.method = method

    def compress(self, prefill: LayerPrefill) -> Compressed:
        raise NotImplementedError("a pass compresses")

    def begin_pass(self, layers: Sequence[int]) -> "_WrittenOutPass":
        return _WrittenOutPass(self.method.begin_pass(layers))


class _WrittenOutPass:
    def __init__(self, compression: CompressionPass) -> None:
        self.compression = compression

    def add(self, prefill: LayerPrefill) -> list[tuple[int, Compressed]]:
        return [
            (layer, Compressed([Segment(*s.materialize(), s.owner, bias=s.bias, mask=s.mask) for s in visual], text))
            for layer, (visual, text) in self.compression.add(prefill)
        ]


def test_eight_bits_are_close_to_all(model: Model, mixed: BatchFeature, greedy: dict[str, Any], expected: Any) -> None:
    assert_same(run(model, Quantized(8), mixed, **greedy), expected, atol=0.05)
    two = {**greedy, "max_new_tokens": 2, "min_new_tokens": 2}
    errors = [
        (run(model, Quantized(bits), mixed, **two).logits[1] - expected.logits[1])[:2].abs().max() for bits in (8, 4, 2)
    ]
    assert errors[0] < errors[1] < errors[2]


def test_parameters_are_stored_once(model: Model, mixed: BatchFeature, random_capsule: Callable[..., Capsule]) -> None:
    """Parameters are those of the capsule: no more after a second image, no more for a larger batch."""
    capsule = random_capsule()
    own = sum(
        p.numel() * p.element_size()
        for codec in capsule.layers
        for p in (codec.keys.theta, codec.values.basis, codec.values.mean)
    )
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

"""Cross-layer transform code: one code for a stack of layers, what each layer reads of it, and where it is kept."""

import copy
import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, cross_layer_capsule, prefill, rand
from support.encode_macs import encode_macs
from support.run_vlm import longer, step
from torch.utils.flop_counter import FlopCounterMode
from transformers import BatchFeature

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.cross_layer import CrossLayerConfig, CrossLayerTransform
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed
from kvcapsule.policy import Combined, TextPruning
from kvcapsule.segments.coefficient_rows import CodedRows
from kvcapsule.segments.memo import Memo
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.geometry import KVGeometry

FOUR = dataclasses.replace(GEOMETRY, layers=4)


def prefills(layers: int) -> list[LayerPrefill]:
    """Each layer with keys and values of its own."""
    of = [dataclasses.replace(prefill(layer), shared={}) for layer in range(layers)]
    keys, values = ([rand(2, HEADS, 30, DIM, seed=seed + i) for i in range(layers)] for seed in (20, 40))
    return [
        dataclasses.replace(p, keys=k, values=v, shared=of[0].shared) for p, k, v in zip(of, keys, values, strict=True)
    ]


def compressed(capsule: Capsule, of: list[LayerPrefill]) -> dict[int, Compressed]:
    run = capsule.begin_pass([p.layer for p in of])
    return {layer: done for p in of for layer, done in run.add(p)}


# The codec


def test_coefficients_by_hand() -> None:
    """One layer, one token, one channel: the first coefficient is the key and twice the value, the second the key less
    the value."""
    transform = CrossLayerTransform(layers=1, head_groups=1, heads=1, tile=1, dim=1, rows=8, channels=2).requires_grad_(
        False
    )
    transform.tokens_in[0, 0] = 1.0
    transform.channels_in[0, 0, 0] = torch.tensor([1.0, 1.0])
    transform.channels_in[1, 0, 0] = torch.tensor([2.0, -1.0])
    key, value = torch.tensor([[[[3.0]]]]), torch.tensor([[[[5.0]]]])
    assert transform.coefficients(transform.across(0, key, value))[0, 0, 0].tolist() == [13.0, -2.0]


def test_all_components_in_eight_bits_give_back_every_layers_keys_and_values() -> None:
    """As many channels as the stack has, axes orthonormal over all of it: only rounding is lost, in every part of
    it."""
    capsule = cross_layer_capsule(FOUR, 8, 8, 4 * 2 * DIM, joint_layers=4).double()
    of = [dataclasses.replace(p, spans=p.spans[:1]) for p in prefills(4)]
    transform = capsule.layers[0].transform
    transform.widths.fill_(8)
    transform.step.fill_(0.05)
    transform.tokens_out.copy_(transform.tokens_in.transpose(1, 2))
    transform.channels_out.copy_(transform.channels_in)
    for p, (layer, done) in zip(of, compressed(capsule, of).items(), strict=True):
        assert p.layer == layer
        keys, values = done.visual[0].materialize(torch.float64)
        for found, true in ((keys, p.keys), (values, p.values)):
            expected = torch.stack([true[0, :, start : start + 8] for start in (3, 11, 19)])
            assert float((found - expected).abs().max()) < 0.05 * 8
            assert float((found - expected).square().mean()) == pytest.approx(0.05**2 / 12, rel=0.2)


@pytest.mark.parametrize("joint_heads", [1, 2])
@pytest.mark.parametrize("frames", [True, False])
def test_attention_over_the_code_is_attention_over_what_it_stands_for(frames: bool, joint_heads: int) -> None:
    """In every layer, with the raw remainder, the text and other tokens, in float64."""
    of = prefills(4)
    done = compressed(cross_layer_capsule(FOUR, joint_heads=joint_heads, canonical_frame=frames), of)
    for p in of:
        visual, text = done[p.layer]
        written_out = Segment(*visual[0].materialize(torch.float64), visual[0].owner)
        found, expected = (attend(p.query, [tiles, *visual[1:], *text], p.scale) for tiles in (visual[0], written_out))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    outputs = [attend(of[0].query, [done[layer].visual[0], *done[0].text], of[0].scale) for layer in range(4)]
    assert all(not torch.allclose(outputs[0], other, atol=1e-2) for other in outputs[1:]), (
        "each layer reads the code by its own maps"
    )


# The run


def test_a_stack_is_done_with_its_last_layer_and_the_next_begins() -> None:
    of = prefills(4)
    run = cross_layer_capsule(FOUR).begin_pass(range(4))
    done = [[layer for layer, _ in run.add(p)] for p in of]
    assert done == [[], [0, 1], [], [2, 3]]


def test_a_last_stack_may_be_short_and_layers_may_be_missing() -> None:
    three = dataclasses.replace(GEOMETRY, layers=3)
    capsule = cross_layer_capsule(three)
    assert [len(stack.transform.channels_in) for stack in capsule.layers] == [4, 2]
    of = prefills(3)
    run = capsule.begin_pass([0, 2])
    assert [[layer for layer, _ in run.add(p)] for p in (of[0], of[2])] == [[0], [2]]


def test_layers_of_a_stack_read_one_code() -> None:
    of = prefills(4)
    done = compressed(cross_layer_capsule(FOUR, joint_heads=2), of)
    tiles = [done[layer].visual[0] for layer in range(4)]
    assert all(isinstance(rows, CodedRows) for s in tiles for rows in (s.keys, s.values))
    assert tiles[0].keys is tiles[0].values is tiles[1].keys and tiles[2].keys is not tiles[0].keys
    stored = sum(storage_bytes(iter(tiles[i].keys.tensors())) for i in (0, 2))
    shared = storage_bytes(iter((tiles[0].owner, *tiles[0].frame.tensors())))
    assert storage_bytes(t for s in tiles for t in s.entry_tensors()) == stored + shared


def test_what_waits_for_the_last_layer_is_not_keys_and_values() -> None:
    of = prefills(2)
    run = cross_layer_capsule().begin_pass(range(2))
    run.add(of[0])
    held = [t for pending in run.pending for s in (*pending.raw.visual, *pending.raw.text) for t in s.entry_tensors()]
    whole = {t.untyped_storage().data_ptr() for t in (of[0].keys, of[0].values)}
    assert not whole & {t.untyped_storage().data_ptr() for t in held}
    assert run.encoding.sums.shape == (3, HEADS, TILE, 20)


def test_a_stack_on_two_devices_is_refused() -> None:
    encoding, tile = cross_layer_capsule().layers[0].start(), rand(1, HEADS, TILE, DIM)
    encoding.add(0, tile, tile)
    with pytest.raises(ValueError, match="layers of one layer group lie on cpu and meta: keep them on one device"):
        encoding.add(1, tile.to("meta"), tile.to("meta"))


def test_images_that_fill_no_tile_stay_raw() -> None:
    of = [dataclasses.replace(p, shared={}) for p in prefills(2)]
    run = cross_layer_capsule(tile=25).begin_pass(range(2))
    for p in of:
        ((layer, (visual, _)),) = run.add(p)
        assert layer == p.layer and all(isinstance(s.keys, torch.Tensor) for s in visual)
        assert sorted((int(row), s.tokens) for s in visual for row in s.owner) == [(0, 24), (1, 10)]


def test_one_layer_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 has no codec of its own: all layers are compressed together"):
        cross_layer_capsule().compress(prefill(1))


def test_selected_rows_stay_in_one_place() -> None:
    of = prefills(2)
    done = compressed(cross_layer_capsule(), of)
    rows, shared = torch.tensor([1, 0, 0]), Memo()
    chosen = {layer: done[layer].visual[0].select(rows, shared) for layer in (0, 1)}
    assert chosen[0].keys is chosen[0].values is chosen[1].keys
    assert chosen[0].owner is chosen[1].owner and chosen[0].frame is chosen[1].frame
    for p in of:
        expected = attend(p.query, [done[p.layer].visual[0], *done[p.layer].text], p.scale)[rows]
        found = attend(p.query[rows], [chosen[p.layer], *(s.select(rows) for s in done[p.layer].text)], p.scale)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_moved_layer_by_layer_it_stays_one_code() -> None:
    """Away from a layer's device and back, one layer after the other, as `offload` and a model's forward do."""
    of = prefills(4)
    done = compressed(cross_layer_capsule(FOUR, joint_layers=4), of)
    here = [done[layer].visual[0] for layer in range(4)]
    away = [s.to("meta") for s in here]
    assert away[0].keys.packed.is_meta and len({id(rows) for s in away for rows in (s.keys, s.values)}) == 1
    # While another layer's rows are still where they were, these are what comes back.
    assert away[0].keys.to("cpu") is here[0].keys
    left = weakref.ref(here[0].keys)
    here.clear()
    done.clear()
    assert left() is None, "what was moved is not held where it was"


# In a model


def test_a_cache_counts_the_code_once_whatever_is_done_to_its_rows(
    model: torch.nn.Module, random_cross_layer: Callable[..., Capsule], make_batch: Callable[..., BatchFeature]
) -> None:
    batch = make_batch((1, "Read line 2."), (2, "Transcribe the page."))
    capsule = random_cross_layer(49, joint_layers=4, joint_heads=2)
    one = int(capsule.layers[0].transform.widths.sum()) + 8 + 2 * 16 * 4
    with attach(model), torch.no_grad():
        cache = CapsuleCache(model.config, capsule)
        model(**batch, **cache_argument(cache))
        assert cache.bytes().visual == 12 * one, "three images of four tiles"
        cache.reorder_cache(torch.tensor([1, 1]))
        assert cache.bytes().visual == 16 * one
        cache.batch_repeat_interleave(2)
        assert cache.bytes().visual == 32 * one
        cache.batch_select_indices(torch.tensor([0]))
        assert cache.bytes().visual == 8 * one
    assert all(layer.memo is None for layer in cache.layers)


def test_generate_with_beams_turns_and_a_policy_for_the_text(
    model: torch.nn.Module, random_cross_layer: Callable[..., Capsule], make_batch: Callable[..., BatchFeature]
) -> None:
    """Beam search over one row gives what it gives in a batch; a second turn with an image goes on behind the first."""
    both, alone = make_batch((1, "Read line 2."), (1, "Transcribe it.")), make_batch((1, "Read line 2."))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 3}
    with attach(model):
        found = [
            model.generate(
                **b, **cache_argument(CapsuleCache(model.config, random_cross_layer(49, joint_layers=3))), **options
            )[0, -5:]
            for b in (both, alone)
        ]
        assert torch.equal(found[0], found[1])
        cache = CapsuleCache(model.config, Combined(random_cross_layer(49, joint_layers=4), TextPruning(0.5, recent=4)))
        for turn in range(2):
            before = cache.get_seq_length()
            with torch.no_grad():
                mask = torch.ones(1, before + alone["input_ids"].shape[1], dtype=torch.int64)
                model(**{**alone, "attention_mask": mask}, **cache_argument(cache))
            assert [len(layer.visual) for layer in cache.layers] == [turn + 1] * 4


@pytest.mark.parametrize("rows", [[1, 0], [0, 0, 1, 1]], ids=str)
def test_rows_of_prefills_that_wait_are_selected_in_all_layers(
    rows: list[int],
    model: torch.nn.Module,
    random_cross_layer: Callable[..., Capsule],
    make_batch: Callable[..., BatchFeature],
) -> None:
    """All are compressed first: what a stack's last layer brings the others would miss the selection."""
    batch, logits = make_batch((1, "Read line 2."), (2, "Transcribe the page.")), []
    mask = longer(batch["attention_mask"], 1)[rows]
    with attach(model), torch.no_grad():
        for waits in (False, True):
            cache = CapsuleCache(model.config, random_cross_layer(49))
            if waits:
                cache.activate_past_recording()
            model(**batch, **cache_argument(cache))
            cache.reorder_cache(torch.tensor(rows))
            logits.append(step(model, cache, torch.tensor([[40]] * len(rows)), mask))
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("paired", [False, True])
def test_a_copied_cache_copies_codes_and_no_codec(
    paired: bool,
    model: torch.nn.Module,
    random_cross_layer: Callable[..., Capsule],
    make_batch: Callable[..., BatchFeature],
) -> None:
    capsule = random_cross_layer(49)
    cache = CapsuleCache(model.config, Combined(capsule, TextPruning(0.5)) if paired else capsule)
    with attach(model), torch.no_grad():
        model(**make_batch((1, "Read line 2.")), **cache_argument(cache))
    made: list[torch.nn.Module] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "__setstate__", lambda self, state: made.append(self))
        twin = copy.deepcopy(cache)
    assert not made
    ours, theirs = ([layer.visual[0].keys for layer in each.layers[:2]] for each in (cache, twin))
    assert theirs[0] is theirs[1] is twin.layers[0].visual[0].values
    assert theirs[0].coding is ours[0].coding and theirs[0].packed.data_ptr() != ours[0].packed.data_ptr()


# Its config and files


def test_saved_and_loaded_it_reads_the_same(tmp_path: Path) -> None:
    capsule, of = cross_layer_capsule(FOUR, joint_heads=2), prefills(4)
    capsule.save_pretrained(tmp_path / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "capsule")
    assert loaded.config == capsule.config == CapsuleConfig.from_dict(json.loads(json.dumps(capsule.config.to_dict())))
    ours, theirs = compressed(loaded, of), compressed(capsule, of)
    for layer in range(4):
        for a, b in zip(ours[layer].visual[0].materialize(), theirs[layer].visual[0].materialize(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint_layers": 0}, "joint_layers 0: a layer group has at least 1 layer"),
        ({"rows": (12,)}, r"rows \[12\]: .* a multiple of 8"),
        ({"channels": (0,)}, r"channels \[0\]: at least 1"),
        ({"latent_bits": 4}, "latent_bits 4: .* leave it 0"),
    ],
)
def test_configs_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossLayerConfig(**{"tile": TILE, "joint_layers": 2, "rows": (8,), "channels": (3,), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": (8, 8)}, "2 rows for 1 layer groups: give one for each group"),
        ({"channels": ()}, "0 channels for 1 layer groups"),
        ({"joint_heads": 3}, "joint_heads 3 does not divide 2 KV heads"),
    ],
)
def test_configs_that_do_not_fit_the_model(options: dict[str, object], message: str) -> None:
    config = CrossLayerConfig(**{"tile": TILE, "joint_layers": 2, "rows": (8,), "channels": (3,), **options})
    with pytest.raises(ValueError, match=message):
        Capsule(CapsuleConfig("cross-layer", config, GEOMETRY, "tiny"))


def test_encoding_costs_the_multiply_adds_that_it_says() -> None:
    """Counted by PyTorch on the codecs themselves."""
    geometry = dataclasses.replace(GEOMETRY, layers=3)
    capsule = cross_layer_capsule(geometry, joint_heads=2)
    with FlopCounterMode(display=False) as counter:
        for stack in capsule.layers:
            encoding, tile = stack.start(), rand(1, HEADS, TILE, DIM)
            for place in range(len(stack.transform.channels_in) // 2):
                encoding.add(place, tile, tile)
            stack.transform.coefficients(encoding.sums)
    assert counter.get_total_flops() == 2 * encode_macs(capsule.config.codec, geometry)


def test_the_maps_of_a_7b_class_model_pay_off_with_the_first_image() -> None:
    """32 layers of 8 KV heads of 128 in bfloat16, two layers and one head together, tiles of 64, half of the channels
    coded."""
    layers, heads, dim, tile, visual = 32, 8, 128, 64, 576
    stack = CrossLayerTransform(
        layers=2, head_groups=heads, heads=1, tile=tile, dim=dim, rows=tile, channels=2 * dim
    ).to(torch.bfloat16)
    maps = layers // 2 * stack.decoder_bytes()
    full = 2 * layers * heads * dim * visual * 2
    assert maps <= 40e6 and full / 20 + maps < 0.6 * full


def test_geometry_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        cross_layer_capsule().require_geometry(KVGeometry("llava", 3, 4, 2, 8, "1d"))

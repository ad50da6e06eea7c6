"""KVCapsule: what its encoders store and its decoders read, its ratios and its config."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, prefill, rand

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import FAMILIES
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, MlpKeys, PcaValues, RetainedKeys
from kvcapsule.errors import CapsuleError, GeometryError
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.ratios import pyramid, retained, weighted
from kvcapsule.segments.quantized_rows import BITS, QuantizedRows
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment, storage_bytes


def orthonormal(stored: int, tile: int = TILE) -> torch.Tensor:
    return torch.linalg.qr(rand(HEADS, tile, stored, seed=5)).Q.transpose(1, 2)


def capsule(key_ratio: float = 0.3, value_ratio: float = 0.4, tile: int = TILE, **options: object) -> Capsule:
    """Two layers with random maps in float64."""
    ratios = {"key_ratios": (key_ratio,) * 2, "value_ratios": (value_ratio,) * 2}
    built = (
        Capsule(CapsuleConfig("kvcapsule", KVCapsuleConfig(tile, **ratios, **options), GEOMETRY, "tiny"))
        .double()
        .requires_grad_(False)
    )
    for seed, layer in enumerate(built.layers):
        stored = len(layer.keys.kept)
        layer.keys.kept.copy_(
            torch.randperm(tile, generator=torch.Generator().manual_seed(seed))[:stored].sort().values
        )
        for parameter in layer.keys.parameters():
            parameter.copy_(rand(*parameter.shape, seed=seed + 10))
        layer.values.basis.copy_(orthonormal(layer.values.basis.shape[1], tile))
        layer.values.mean.copy_(rand(HEADS, DIM, seed=seed + 20))
    return built


def test_retained() -> None:
    """m = ceil(r T), at least 1, and no token more for a rounding error."""
    table = {(0.25, 49): 13, (0.1, 49): 5, (1.0, 49): 49, (0.001, 49): 1, (0.4, 196): 79, (0.7, 10): 7, (0.07, 100): 7}
    assert {pair: retained(*pair) for pair in table} == table
    assert 0.07 * 100 > 7


def test_linear_keys_by_hand() -> None:
    codec = RetainedKeys(1, 3, 2)
    codec.kept.copy_(torch.tensor([0, 2]))
    codec.theta.data.copy_(torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]]))
    keys = torch.tensor([[2.0, 0.0], [9.0, 9.0], [0.0, 4.0]])[None, None]
    part = codec.encode(keys)
    assert part.keys.tolist() == [[[[2.0, 0.0], [0.0, 4.0]]]]
    segment = Segment(part.keys, keys, torch.tensor([0]), score_map=part.score_map)
    assert segment.materialize()[0][0, 0].tolist() == [[2.0, 0.0], [1.0, 2.0], [0.0, 4.0]]


def test_pca_values_by_hand() -> None:
    """One direction, the mean of two tokens: 1 and 3 above a mean of 10 come back as 2 and 2."""
    codec = PcaValues(1, 2, 1, 1)
    codec.basis.copy_(torch.tensor([[[0.5**0.5, 0.5**0.5]]]))
    codec.mean.fill_(10.0)
    part = codec.encode(torch.tensor([11.0, 13.0]).view(1, 1, 2, 1))
    torch.testing.assert_close(part.values.flatten(), torch.tensor([4 * 0.5**0.5]))
    segment = Segment(
        torch.zeros(1, 1, 2, 1), part.values, torch.tensor([0]), value_map=part.value_map, value_mean=part.value_mean
    )
    torch.testing.assert_close(segment.materialize()[1].flatten(), torch.tensor([12.0, 12.0]))


@pytest.mark.parametrize(
    "options", [{}, {"canonical_frame": False}, {"key_decoder": "mlp", "hidden": 6}], ids=["linear", "no frames", "mlp"]
)
def test_attention_over_latents_is_attention_over_the_reconstruction(options: dict[str, object]) -> None:
    """The reconstruction written out by the paper's equations, in the tile's frame where there is one."""
    built, of = capsule(**options), prefill(1)
    (segment, rest), text = built.compress(of)
    codec, query = built.layers[1], rand(2, 4, 3, DIM, seed=7)
    starts = [(0, 3), (0, 13), (1, 5)]
    assert segment.owner.tolist() == [row for row, _ in starts]
    keys, values = [], []
    for row, start in starts:
        k, v = of.keys[row][:, start : start + TILE], of.values[row][:, start : start + TILE]
        cos, sin = (x[:, start] for x in of.position_embeddings)
        frame = Frame(*(x.chunk(2, dim=-1)[0] for x in (cos, sin)))
        if built.config.codec.canonical_frame:
            k = frame.unrotate(k[None])[0]
        kept = k[:, codec.keys.kept]
        if "key_decoder" in options:
            kept = (
                codec.keys.outer @ torch.nn.functional.gelu(codec.keys.inner @ kept + codec.keys.inner_bias)
                + codec.keys.outer_bias
            )
        else:
            kept = codec.keys.theta @ kept
        keys.append(frame.rotate(kept[None])[0] if built.config.codec.canonical_frame else kept)
        basis, mean = codec.values.basis, codec.values.mean[:, None]
        values.append(basis.transpose(1, 2) @ (basis @ (v - mean)) + mean)
    written_out = Segment(torch.stack(keys), torch.stack(values), segment.owner)
    expected = attend(query, [written_out, rest, *text], of.scale)
    torch.testing.assert_close(attend(query, [segment, rest, *text], of.scale), expected, rtol=1e-10, atol=1e-10)
    full = Segment(of.keys, of.values, torch.arange(2))
    assert not torch.allclose(attend(query, [full], of.scale), expected, atol=1e-2)


def test_values_of_full_rank_are_exact() -> None:
    built, of = capsule(value_ratio=1.0), prefill()
    (segment, _), _ = built.compress(of)
    expected = torch.stack([of.values[0][:, 3:13], of.values[0][:, 13:23], of.values[1][:, 5:15]])
    torch.testing.assert_close(segment.materialize(torch.float64)[1], expected, rtol=1e-10, atol=1e-10)
    (lossy, _), _ = capsule(value_ratio=0.9).compress(of)
    assert not torch.allclose(lossy.materialize(torch.float64)[1], expected, atol=1e-2)


def test_keys_of_full_rank_are_exact() -> None:
    built, of = capsule(key_ratio=1.0), prefill()
    for layer in built.layers:
        layer.keys.theta.copy_(torch.eye(TILE))
    (segment, _), _ = built.compress(of)
    expected = torch.stack([of.keys[0][:, 3:13], of.keys[0][:, 13:23], of.keys[1][:, 5:15]])
    torch.testing.assert_close(segment.materialize(torch.float64)[0], expected, rtol=1e-10, atol=1e-10)


def test_what_fills_no_tile_is_raw_and_exact() -> None:
    """24 tokens are two tiles of ten and four raw; the image of the other row is one tile."""
    of = prefill()
    visual, text = capsule().compress(of)
    assert [(s.owner.tolist(), s.tokens) for s in visual] == [([0, 0, 1], 10), ([0], 4)]
    torch.testing.assert_close(visual[1].keys, of.keys[:1, :, 23:27], rtol=0, atol=0)
    torch.testing.assert_close(visual[1].values, of.values[:1, :, 23:27], rtol=0, atol=0)
    assert sum(int(s.mask.sum()) if s.mask is not None else s.tokens * len(s.owner) for s in text) == 60 - 34


def test_an_image_smaller_than_a_tile_is_raw_and_visual() -> None:
    of = prefill()
    visual, text = capsule(tile=25).compress(of)
    assert sum(s.tokens * len(s.owner) for s in visual) == 34
    assert all(s.score_map is None and s.frame is None for s in visual)
    assert sum(s.tokens * len(s.owner) for s in text) >= 26


def test_a_prompt_without_image_is_text() -> None:
    visual, text = capsule().compress(prefill(spans=()))
    assert visual == []
    assert sum(s.tokens * len(s.owner) for s in text) == 60


def test_layers_of_one_prompt_share_frames_and_owners() -> None:
    built, first = capsule(), prefill(0)
    second = dataclasses.replace(first, layer=1)
    a, b = built.compress(first).visual[0], built.compress(second).visual[0]
    assert a.frame is b.frame
    assert a.owner is b.owner
    assert not torch.equal(a.keys, b.keys)


def test_frames_need_the_rotation() -> None:
    with pytest.raises(RuntimeError, match=r"inside `with kvcapsule\.attach"):
        capsule().compress(prefill(rotary=False))
    assert capsule(canonical_frame=False).compress(prefill(rotary=False)).visual[0].frame is None


def test_without_frames_any_rotation_will_do() -> None:
    of = prefill()
    unpaired = torch.arange(DIM) * 0.1 * torch.arange(30.0)[:, None]
    of = dataclasses.replace(of, position_embeddings=(unpaired.cos()[None], unpaired.sin()[None]))
    with pytest.raises(ValueError, match="neither channels that lie half a head apart nor neighbouring"):
        capsule().compress(of)
    assert capsule(canonical_frame=False).compress(of).visual[0].frame is None


@pytest.mark.parametrize(
    ("mean", "layers", "slope"), [(0.4, 4, 0.5), (0.25, 28, 0.9), (0.1, 2, 0.0), (0.5, 3, 0.99), (0.3, 1, 0.5)]
)
def test_pyramid_keeps_the_mean(mean: float, layers: int, slope: float) -> None:
    ratios = pyramid(mean, layers, slope)
    assert len(ratios) == layers
    assert sum(ratios) / layers == pytest.approx(mean)
    assert list(ratios) == sorted(ratios, reverse=True)
    if layers > 1:
        assert ratios[0] == pytest.approx(mean * (1 + slope))
        assert ratios[-1] == pytest.approx(mean * (1 - slope))


def test_pyramid_is_less_steep_where_the_first_layer_would_pass_one() -> None:
    ratios = pyramid(0.8, 5, 0.5)
    assert ratios == pytest.approx((1.0, 0.9, 0.8, 0.7, 0.6))
    assert max(pyramid(0.9, 7, 0.9)) <= 1
    assert pyramid(1.0, 3, 0.5) == (1.0, 1.0, 1.0)


def test_pyramid_errors() -> None:
    for mean in (0.0, -0.5, 1.2):
        with pytest.raises(ValueError, match=r"retention ratio .* is outside \(0, 1\]"):
            pyramid(mean, 4, 0.5)
    for slope in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"slope .* is outside \[0, 1\)"):
            pyramid(0.5, 4, slope)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 0}, "tile 0 must be at least 1"),
        ({"key_decoder": "rnn"}, "'rnn' is neither 'linear' nor 'mlp'"),
        ({"key_decoder": "mlp", "canonical_frame": False}, "needs canonical_frame=True"),
        ({"latent_bits": 5}, "5 bits cannot be packed: choose one of 1, 2, 3, 4, 8"),
        ({"key_ratios": (0.5, 0.0)}, r"key retention ratio 0\.0 is outside"),
        ({"value_ratios": (1.5, 0.5)}, r"value retention ratio 1\.5 is outside"),
    ],
)
def test_configs_that_cannot_be(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVCapsuleConfig(**{"tile": 10, "key_ratios": (0.5, 0.5), "value_ratios": (0.5, 0.5), **options})


def test_identity_needs_a_tile() -> None:
    with pytest.raises(ValueError, match="tile 0"):
        IdentityConfig(0)


@pytest.mark.parametrize(
    ("keys", "values", "message"), [((0.5,), (0.5, 0.5), "1 key"), ((0.5, 0.5), (0.5,) * 3, "3 value")]
)
def test_one_ratio_for_each_layer(keys: tuple[float, ...], values: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message} retention ratios for 2 layers"):
        Capsule(CapsuleConfig("kvcapsule", KVCapsuleConfig(10, key_ratios=keys, value_ratios=values), GEOMETRY, "tiny"))


def test_sizes_follow_the_ratios_layer_by_layer() -> None:
    built = Capsule(
        CapsuleConfig(
            "kvcapsule", KVCapsuleConfig(10, key_ratios=(0.5, 0.2), value_ratios=(1.0, 0.31)), GEOMETRY, "tiny"
        )
    )
    assert [tuple(layer.keys.theta.shape) for layer in built.layers] == [(2, 10, 5), (2, 10, 2)]
    assert [tuple(layer.values.basis.shape) for layer in built.layers] == [(2, 10, 10), (2, 4, 10)]
    mlp = KVCapsuleConfig(10, key_ratios=(0.5, 0.2), value_ratios=(1.0, 0.31), key_decoder="mlp", hidden=7)
    assert isinstance(mlp.build(GEOMETRY, 0).keys, MlpKeys)
    assert mlp.build(GEOMETRY, 1).keys.inner.shape == (2, 7, 2)


def test_config_as_dict_and_back() -> None:
    config = capsule().config
    assert CapsuleConfig.from_dict(config.to_dict()) == config
    lists = {**config.to_dict(), "codec": {**config.to_dict()["codec"], "key_ratios": [0.3, 0.3]}}
    assert CapsuleConfig.from_dict(lists) == config


def test_a_config_from_before_latent_bits_means_none() -> None:
    values = capsule().config.to_dict()
    assert values["codec"].pop("latent_bits") == 0
    assert CapsuleConfig.from_dict(values) == capsule().config
    assert CapsuleConfig.from_dict(capsule(latent_bits=3).config.to_dict()).codec.latent_bits == 3


def test_config_refuses_what_it_does_not_know() -> None:
    values = capsule().config.to_dict()
    with pytest.raises(
        ValueError, match=r"KVCapsuleConfig has no field bits, codebook; it has tile, .*latent_bits, align, key_ratios"
    ):
        KVCapsuleConfig.from_dict({**values["codec"], "bits": 3, "codebook": 1})
    with pytest.raises(CapsuleError, match="no field bits"):
        CapsuleConfig.from_dict({**values, "codec": {**values["codec"], "bits": 3}})
    with pytest.raises(CapsuleError, match=r"unknown codec family 'wavelet'.*identity, kvcapsule, transform"):
        CapsuleConfig.from_dict({**values, "family": "wavelet"})
    with pytest.raises(CapsuleError, match="format version 99"):
        CapsuleConfig.from_dict({**values, "format_version": 99})
    with pytest.raises(CapsuleError, match="unknown keys colour, size"):
        CapsuleConfig.from_dict({**values, "size": 1, "colour": 2})
    with pytest.raises(CapsuleError, match="lacks 'geometry'"):
        CapsuleConfig.from_dict({k: v for k, v in values.items() if k != "geometry"})
    with pytest.raises(CapsuleError, match="heads_of_state"):
        CapsuleConfig.from_dict({**values, "geometry": {**values["geometry"], "heads_of_state": 1}})


def test_another_geometry_is_refused() -> None:
    capsule().require_geometry(GEOMETRY)
    with pytest.raises(GeometryError, match="kv_heads: 2 != 4"):
        capsule().require_geometry(dataclasses.replace(GEOMETRY, kv_heads=4))


def test_encoding_takes_the_dtype_of_the_model() -> None:
    built = capsule(canonical_frame=False)
    of = prefill()
    half = dataclasses.replace(of, keys=of.keys.bfloat16(), values=of.values.bfloat16(), query=of.query.bfloat16())
    segment = built.compress(half).visual[0]
    assert {t.dtype for t in (segment.keys, segment.values, *segment.parameter_tensors())} == {torch.bfloat16}


@pytest.mark.parametrize("bits", BITS)
def test_latents_in_few_bits_are_the_quantised_latents(bits: int) -> None:
    """Three rows of keys and four of values a tile, each channel with a step and a zero; the remainder stays raw."""
    of = prefill()
    plain, rest = capsule().compress(of).visual
    packed, same = capsule(latent_bits=bits).compress(of).visual
    for ours, latents in ((packed.keys, plain.keys), (packed.values, plain.values)):
        assert isinstance(ours, QuantizedRows)
        assert ours.bits == bits
        assert torch.equal(ours.read(torch.float64), QuantizedRows.pack(latents, bits).read(torch.float64))
    assert torch.equal(same.keys, rest.keys)
    frames_and_owners = 3 * (2 * 4 * 8 + 8)
    assert storage_bytes(plain.entry_tensors()) == 3 * HEADS * DIM * 8 * (3 + 4) + frames_and_owners
    assert storage_bytes(packed.entry_tensors()) == 3 * 2 * HEADS * DIM * (bits + 2 * 8) + frames_and_owners


def test_attention_is_near_in_eight_bits_and_farther_in_fewer() -> None:
    of, query = prefill(), rand(2, 4, 3, DIM, seed=7)

    def attended(bits: int) -> torch.Tensor:
        visual, text = capsule(0.8, 0.8, latent_bits=bits).compress(of)
        return attend(query, [*visual, *text], of.scale)

    exact = attended(0)
    errors = [float((attended(bits) - exact).norm() / exact.norm()) for bits in (8, 4, 3, 2, 1)]
    assert 1e-6 < errors[0] < 0.01
    assert errors == sorted(errors)
    assert errors[-1] > 0.1


def test_an_identity_in_few_bits_keeps_every_token_in_them() -> None:
    built = Capsule(
        CapsuleConfig("identity", IdentityConfig(TILE, canonical_frame=False, latent_bits=8), GEOMETRY, "tiny")
    )
    of = prefill()
    segment = built.compress(of).visual[0]
    tiles = torch.stack([of.keys[0][:, 3:13], of.keys[0][:, 13:23], of.keys[1][:, 5:15]])
    assert torch.equal(segment.materialize(torch.float64)[0], QuantizedRows.pack(tiles, 8).read(torch.float64))


def test_an_mlp_takes_no_latent_bits() -> None:
    """What it stores is read by its network, not as it lies."""
    with pytest.raises(ValueError, match="latent_bits"):
        capsule(key_decoder="mlp", hidden=6, latent_bits=4).compress(prefill())


def test_the_registry() -> None:
    assert FAMILIES["kvcapsule"].config is KVCapsuleConfig
    assert all(dataclasses.is_dataclass(family.config) for family in FAMILIES.values())


def test_random_capsule_is_as_its_config_says(random_capsule: Callable[..., Capsule]) -> None:
    """The fixture that other tests rely on: retained tokens in order, orthonormal bases."""
    for layer in random_capsule(0.25, 0.25, 49).layers:
        assert layer.keys.kept.diff().min() > 0
        gram = layer.values.basis @ layer.values.basis.transpose(1, 2)
        torch.testing.assert_close(gram, torch.eye(13).expand(2, -1, -1), rtol=0, atol=1e-5)


def test_weighted_ratios_keep_their_mean_and_stay_within_one() -> None:
    assert weighted(0.4, [1, 1, 2]) == pytest.approx((0.3, 0.3, 0.6))
    # 0.8 * (0.5, 0.5, 2) would pass 1 in the last layer: what it cannot use goes to the others.
    assert weighted(0.8, [0.5, 0.5, 2]) == pytest.approx((0.7, 0.7, 1.0))
    assert weighted(1.0, [1, 5]) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(("mean", "weights"), [(1.2, [1.0]), (0.4, []), (0.4, [1.0, 0.0])])
def test_weights_that_cannot_work_are_refused(mean: float, weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"outside \(0, 1\]|one positive number"):
        weighted(mean, weights)

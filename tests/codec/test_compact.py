"""Compact capsules: what is kept, what it stands for, how near attention stays, and the bank and selector behind it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DIM, GEOMETRY, HEADS, TILE, prefill, rand

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec import FAMILIES, Encoded, compact
from kvcapsule.codec.attention_matching import fit_masses, marginal_gains, targets
from kvcapsule.codec.base import KeyPart, ValuePart
from kvcapsule.codec.compact import CompactConfig, CompactLayer
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.training.families.token_selector import chosen_by_teacher, greedy_choice, imitation_loss, initialise
from kvcapsule.training.harvest import LayerHarvest, Recorder
from kvcapsule.training.losses import full_output, output_error
from kvcapsule.training.main import main as train
from kvcapsule.training.query_bank import QueryBank
from kvcapsule.vlm.geometry import KVGeometry

LONG = 24
"""Tokens of the tiles whose fit is measured."""
BANK = 96


def layer(ratio: float, heads: int = HEADS, tile: int = TILE, dim: int = DIM, **options: Any) -> CompactLayer:
    """One layer with a random bank, in float64."""
    geometry = KVGeometry("llava", 1, 2 * heads, heads, dim, "1d")
    built = CompactConfig(tile, ratios=(ratio,), **{"bank": BANK, **options}).build(geometry, 0).double()
    assert isinstance(built, CompactLayer)
    built.bank.copy_(rand(*built.bank.shape, seed=9))
    if built.selector is not None:
        for seed, parameter in enumerate(built.selector.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=seed))
    return built.requires_grad_(False)


def capsule(ratio: float = 0.4, **options: Any) -> Capsule:
    """A capsule of random banks for the small geometry, in float32."""
    built = Capsule(
        CapsuleConfig("compact", CompactConfig(TILE, ratios=(ratio,) * 2, **{"bank": 64, **options}), GEOMETRY, "tiny")
    )
    for seed, codec in enumerate(built.layers):
        codec.bank.copy_(rand(*codec.bank.shape, seed=seed + 30))
        for number, parameter in enumerate(codec.parameters()):
            parameter.data.copy_(rand(*parameter.shape, seed=number + 40))
    return built.requires_grad_(False)


def low_rank(entries: int = 6, rank: int = 4, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [E, H, T, D] that vary in few directions along their tokens, and queries [E, 2 H, 40, D] that no
    bank holds."""
    basis = rand(entries, HEADS, LONG, rank, seed=1)
    keys = 0.5 * (basis @ rand(entries, HEADS, rank, DIM, seed=2) + noise * rand(entries, HEADS, LONG, DIM, seed=3))
    values = basis @ rand(entries, HEADS, rank, DIM, seed=4) + noise * rand(entries, HEADS, LONG, DIM, seed=5)
    return keys, values, rand(entries, 2 * HEADS, 40, DIM, seed=6)


def error(encoded: Encoded, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> float:
    """Relative squared error of attention's output over the tile and three raw tokens, which make the tile's mass
    matter."""
    owner = torch.arange(len(keys))
    text = Segment(rand(len(keys), HEADS, 3, DIM, seed=7), rand(len(keys), HEADS, 3, DIM, seed=8), owner)
    truth = attend(query, [Segment(keys, values, owner), text], DIM**-0.5)
    got = attend(query, [encoded.segment(owner, None), text], DIM**-0.5)
    return float((got - truth).square().sum() / truth.square().sum())


def selected(keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor) -> Encoded:
    """Kept tokens as they are."""
    index = kept[..., None].expand(-1, -1, -1, DIM)
    return Encoded(KeyPart(keys.gather(2, index)), ValuePart(values.gather(2, index)))


def evenly(codec: CompactLayer, keys: torch.Tensor) -> torch.Tensor:
    return ((torch.arange(codec.stored) + 0.5) * keys.shape[2] / codec.stored).long().expand(*keys.shape[:2], -1)


@pytest.mark.parametrize("selector", ["attention", "learned"])
@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_of_one_is_the_tile_itself(selector: str, passes: int, dtype: torch.dtype) -> None:
    keys, values, query = (x.to(dtype) for x in low_rank())
    codec = layer(1.0, tile=LONG, selector=selector, passes=passes).to(dtype)
    encoded = codec.encode(keys, values)
    assert encoded.keys.keys.dtype == encoded.values.values.dtype == encoded.bias.dtype == dtype
    owner = torch.arange(len(keys))
    text = Segment(
        torch.zeros(len(keys), HEADS, 1, DIM, dtype=dtype), torch.ones(len(keys), HEADS, 1, DIM, dtype=dtype), owner
    )
    truth = attend(query, [Segment(keys, values, owner), text], DIM**-0.5)
    torch.testing.assert_close(
        attend(query, [encoded.segment(owner, None), text], DIM**-0.5), truth, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(encoded.keys.keys, keys, rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("passes", [0, 2])
def test_matching_beats_selection_alone_and_even_spacing(ratio: float, passes: int) -> None:
    """Each part earns its place: the bias and the refit on the same tokens, then the choice of tokens."""
    keys, values, query = low_rank()
    codec = layer(ratio, tile=LONG, passes=passes)
    reading = codec.bank_attention(keys)
    kept = codec.choose(reading, keys, values).kept
    matched = codec.fit(reading, keys, values, kept)
    plain = selected(keys, values, kept)
    found = error(matched, keys, values, query)
    assert found < 0.5 * error(plain, keys, values, query)
    assert found < error(plain._replace(bias=matched.bias), keys, values, query)
    assert found < error(matched._replace(bias=None), keys, values, query)
    assert found < 0.5 * error(selected(keys, values, evenly(codec, keys)), keys, values, query)


def test_passes_choose_better_than_attention_alone_and_greedy_better_still() -> None:
    """Every token comes twice, so that attention alone keeps both of a pair."""
    keys, values, query = low_rank(noise=0.3)
    keys, values = (x[:, :, : LONG // 2].repeat(1, 1, 2, 1) for x in (keys, values))
    errors = []
    for passes in (0, 1, 3):
        codec = layer(0.25, tile=LONG, passes=passes)
        errors.append(error(codec.encode(keys, values), keys, values, query))
    reading = codec.bank_attention(keys)
    errors.append(
        error(codec.fit(reading, keys, values, greedy_choice(reading, values, codec.stored)), keys, values, query)
    )
    assert errors[0] > 2 * errors[1] > 2 * errors[2]
    assert errors[3] < errors[1]


def test_two_identical_tokens_become_one_of_twice_the_mass() -> None:
    """Tokens 0 and 2 are alike in key and value: one of them is kept, and its bias is log 2."""
    keys = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0]], dtype=torch.float64)[None, None]
    values = torch.tensor([[1.0, 5.0], [7.0, 2.0], [1.0, 5.0]], dtype=torch.float64)[None, None]
    codec = layer(0.6, heads=1, tile=3, dim=2, passes=1)
    assert codec.stored == 2
    encoded = codec.encode(keys, values)
    assert encoded.keys.keys.tolist() == [[[[3.0, 0.0], [0.0, 3.0]]]]
    torch.testing.assert_close(encoded.bias.exp(), torch.tensor([[[2.0, 1.0]]], dtype=torch.float64))
    torch.testing.assert_close(encoded.values.values, values[:, :, :2])
    (whole,) = layer(0.1, heads=1, tile=2, dim=2).encode(keys[:, :, [0, 2]], values[:, :, [0, 2]])[2]
    torch.testing.assert_close(whole.exp(), torch.tensor([[2.0]], dtype=torch.float64))


def test_kept_keys_carry_the_mass_of_the_tile() -> None:
    """Under queries that the bank does not hold, on average; without the bias two thirds of the tile's mass are
    gone."""
    keys, values, query = low_rank(noise=0.05)
    encoded = layer(0.25, tile=LONG).encode(keys, values)
    grouped = query.unflatten(1, (HEADS, 2)).flatten(2, 3) * DIM**-0.5
    whole = (grouped @ keys.transpose(-1, -2)).logsumexp(-1)
    scores = grouped @ encoded.keys.keys.transpose(-1, -2)
    assert float(((scores + encoded.bias[:, :, None]).logsumexp(-1) - whole).abs().mean()) < 0.25
    assert float((scores.logsumexp(-1) - whole).abs().mean()) > 0.9


def test_masses_are_a_least_squares_fit_pulled_to_their_start() -> None:
    """Against the solution written out; where a bound holds a weight, the others are the best beside it."""
    rows, start = rand(1, 1, 30, 4, seed=1).abs(), rand(1, 1, 4, seed=2).abs()
    gram = (rows.transpose(-1, -2) @ rows)[0, 0]
    pull = gram.diagonal().mean()
    for wanted in (torch.ones(1, 1, 30, 1, dtype=torch.float64), rows[..., :1] + 0.5):
        right = (rows.transpose(-1, -2) @ wanted)[0, 0, :, 0] + pull * start[0, 0].clamp(0.1, 10)
        expected = torch.linalg.solve(gram + pull * torch.eye(4), right)
        found = fit_masses(rows.mT, wanted.mT, start, tile=10)[0, 0]
        if float(expected.min()) < 0.1:
            low = expected < 0.1
            free = ~low
            right = right - 0.1 * gram[:, low].sum(1)
            expected[low] = 0.1
            expected[free] = torch.linalg.solve((gram + pull * torch.eye(4))[free][:, free], right[free])
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
        assert float((found - start[0, 0].clamp(0.1, 10)).abs().max()) > 0.1


def test_attention_ranks_by_root_mean_square() -> None:
    """One query looks at token 0 alone, four others share their attention among 1 and 2 evenly: 1, then 2 x 0.25 x
    2."""
    codec = layer(0.3, heads=1, tile=4, dim=4, bank=5, passes=0, scale=1.0)
    codec.bank.copy_(60 * torch.tensor([[1.0, 0, 0, 0], *[[0, 1.0, 0, 0]] * 4]))
    keys = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    keys[0, 0, 0, 0] = keys[0, 0, 1, 1] = keys[0, 0, 2, 1] = 1.0
    attention = codec.bank_attention(keys).attention[0, 0].T
    torch.testing.assert_close(attention[0], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    torch.testing.assert_close(attention[1:], torch.tensor([[0, 0.5, 0.5, 0]] * 4, dtype=torch.float64))
    values = rand(1, 1, 4, 4)
    assert codec.stored == 2
    assert codec.choose(codec.bank_attention(keys), keys, values).kept.tolist() == [[[0, 1]]], (
        "1 and 2 are equal: the earlier one"
    )
    codec.bank[:, 0] = codec.bank[:, 1]
    assert codec.choose(codec.bank_attention(keys), keys, values).kept.tolist() == [[[1, 2]]]


def test_what_a_token_adds_is_what_a_fit_says() -> None:
    """Against least squares written out: explained energy of the targets with and without each token, in the order of
    the ranking."""
    keys, values, _ = low_rank(1)
    codec = layer(0.5, tile=LONG)
    reading = codec.bank_attention(keys)
    gram, target, _ = targets(reading, values)
    ranking = rand(1, HEADS, LONG, seed=3)
    gains = marginal_gains(gram, target, ranking)
    attention = reading.attention[0, 1].T
    size = values[0, 1].square().sum(-1).mean().sqrt()
    wanted = attention @ torch.cat([values[0, 1], (0.3 * size).expand(LONG, 1)], dim=1)
    order = ranking[0, 1].argsort(descending=True)
    explained = [0.0]
    for count in range(1, 6):
        columns = attention[:, order[:count]]
        explained.append(float((columns @ torch.linalg.lstsq(columns, wanted).solution).square().sum()))
    expected = torch.tensor(explained, dtype=torch.float64).diff()
    torch.testing.assert_close(gains[0, 1][order[:5]], expected, rtol=2e-2, atol=1e-3 * float(expected[0]))


def test_greedy_choice_takes_the_most_explaining_token_next() -> None:
    keys, values, _ = low_rank(2)
    codec = layer(0.5, tile=LONG)
    reading = codec.bank_attention(keys)
    attention, gram_and_target = reading.attention[1, 0].T, targets(reading, values)
    wanted = attention @ torch.linalg.solve(gram_and_target[0], gram_and_target[1])[1, 0]

    def unexplained(kept: list[int]) -> float:
        columns = attention[:, kept]
        return float((wanted - columns @ torch.linalg.lstsq(columns, wanted).solution).square().sum())

    kept: list[int] = []
    for _ in range(5):
        kept.append(min((t for t in range(LONG) if t not in kept), key=lambda t: unexplained([*kept, t])))
    assert greedy_choice(reading, values, 5)[1, 0].tolist() == sorted(kept)


def plainly(
    codec: CompactLayer, keys: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One head's tile [T, D] as the formulas have it: kept tokens, bias and values. With attention as the ranking and
    raw latents."""
    tile, bank = len(keys), codec.bank[0]
    attention = (codec.scale * bank @ keys.T).softmax(-1)
    ranking = attention.square().mean(0)
    among = ranking.argsort(descending=True, stable=True)[: max(112, 4 * codec.stored)].sort().values
    output = attention @ torch.cat([values, (0.3 * values.square().sum(-1).mean().sqrt()).expand(tile, 1)], dim=1)
    columns = attention[:, among] / attention[:, among].norm(dim=0)
    ranking = ranking[among]
    for _ in range(codec.passes):
        order = ranking.argsort(descending=True, stable=True)
        gram = columns[:, order].T @ columns[:, order] + 1e-4 * torch.eye(len(order))
        gains = torch.linalg.solve(torch.linalg.cholesky(gram), columns[:, order].T @ output).square().sum(1)
        ranking = torch.zeros_like(gains).index_put((order,), gains)
    kept = among[ranking.argsort(descending=True, stable=True)[: codec.stored]].sort().values

    scores = codec.scale * bank @ keys[kept].T
    mass = (codec.scale * bank @ keys.T).exp().sum(1, keepdim=True)
    rows = scores.exp() / mass
    cosine = (attention / attention.norm(dim=0)).T @ (rows / rows.norm(dim=0))
    nearest = cosine.argmax(1)
    nearest[kept] = torch.arange(len(kept))
    share = attention.mean(0)[:, None] * (nearest[:, None] == torch.arange(len(kept)))
    ones = torch.ones(1, 1, 1, len(bank), dtype=rows.dtype)
    bias = fit_masses(rows.T[None, None], ones, (share.sum(0) / rows.mean(0))[None, None], tile)[0, 0].log()
    means = (share / share.sum(0)).T @ values
    weights = (scores + bias).softmax(1)
    gram = weights.T @ weights
    gram = gram + codec.ridge * gram.diagonal().mean() * torch.eye(len(kept))
    return kept, bias, means + torch.linalg.solve(gram, weights.T @ (attention @ values - weights @ means))


@pytest.mark.parametrize("passes", [0, 1, 2])
@pytest.mark.parametrize(("tile", "ratio"), [(LONG, 0.3), (320, 0.05)], ids=["all compete", "a shortlist competes"])
def test_encoding_is_what_the_formulas_say(passes: int, tile: int, ratio: float) -> None:
    # Some values are far greater than others whatever attention they get, so that a shortlist leaves out tokens that
    # would be kept.
    keys, values = (
        2 * rand(4, 1, tile, DIM, seed=1),
        rand(4, 1, tile, DIM, seed=2) * rand(4, 1, tile, 1, seed=3).mul(2).exp(),
    )
    codec = layer(ratio, heads=1, tile=tile, passes=passes, bank=400)
    found = codec.encode(keys, values)
    for i in range(4):
        kept, bias, refit = plainly(codec, keys[i, 0], values[i, 0])
        torch.testing.assert_close(found.keys.keys[i, 0], keys[i, 0][kept], rtol=0, atol=0)
        torch.testing.assert_close(found.bias[i, 0], bias, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.values.values[i, 0], refit, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"passes": 0}, {"selector": "learned"}, {"latent_bits": 4}], ids=str)
def test_tiles_encoded_in_turn_are_those_encoded_together(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share memory: six tiles by fours, the last two of which are fewer, and one by one."""
    keys, values, _ = low_rank()
    codec = layer(0.3, tile=LONG, **options)
    together = codec.encode(keys, values)
    for at_once in (4 * HEADS * BANK * LONG, 1):
        monkeypatch.setattr(compact, "_AT_ONCE", at_once)
        for one, other in zip(codec.encode(keys, values), together, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"passes": 0}, {"selector": "learned"}, {"latent_bits": 4}], ids=str)
def test_a_batch_is_its_entries_one_by_one(options: dict[str, Any]) -> None:
    keys, values, _ = low_rank()
    codec = layer(0.3, tile=LONG, **options)
    together = codec.encode(keys, values)
    for i in range(len(keys)):
        alone = codec.encode(keys[i : i + 1], values[i : i + 1])
        torch.testing.assert_close(alone.keys.keys, together.keys.keys[i : i + 1], rtol=0, atol=0)
        torch.testing.assert_close(alone.values.values, together.values.values[i : i + 1], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(alone.bias, together.bias[i : i + 1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(codec.encode(keys, values).values.values, together.values.values, rtol=0, atol=0)


def test_heads_and_images_keep_tokens_of_their_own() -> None:
    keys, values, _ = low_rank()
    codec = layer(0.25, tile=LONG)
    kept = codec.choose(codec.bank_attention(keys), keys, values).kept
    assert (kept.diff(dim=-1) > 0).all()
    assert not torch.equal(kept[:, 0], kept[:, 1])
    assert not torch.equal(kept[0], kept[1])


def test_values_are_refit_to_keys_as_they_will_be_read() -> None:
    """With two-bit latents, fitting to the quantised keys is better than fitting to the keys and quantising them
    afterwards."""
    keys, values, query = low_rank()
    aware, blind = layer(0.5, tile=LONG, latent_bits=2), layer(0.5, tile=LONG)
    packed = {name: codec.encode(keys, values).quantised(2) for name, codec in (("aware", aware), ("blind", blind))}
    # The values in full precision, so that the keys alone differ.
    errors = {
        name: error(packed[name]._replace(values=codec.encode(keys, values).values), keys, values, query)
        for name, codec in (("aware", aware), ("blind", blind))
    }
    assert errors["aware"] < 0.6 * errors["blind"]


@pytest.mark.parametrize("factor", [0.0, 30.0, 1e4], ids=["alike", "sharp", "one-hot"])
def test_extreme_scores_stay_finite(factor: float) -> None:
    """Keys that are all alike, and scores far past what exp holds in fp32."""
    keys, values, _ = (x.float() for x in low_rank())
    for options in ({}, {"latent_bits": 1}, {"passes": 0}):
        encoded = layer(0.25, tile=LONG, **options).float().encode(factor * keys, values)
        for tensor in (encoded.keys.keys, encoded.values.values, encoded.bias):
            assert torch.isfinite(tensor).all()
        assert float(encoded.values.values.abs().max()) < 10 * float(values.abs().max())


def test_half_precision_is_stored_and_fitted_in_fp32() -> None:
    keys, values, query = low_rank()
    codec = layer(0.5, tile=LONG).float()
    encoded = codec.encode(keys.bfloat16(), values.bfloat16())
    assert encoded.keys.keys.dtype == encoded.values.values.dtype == encoded.bias.dtype == torch.bfloat16
    assert (
        error(encoded, keys, values, query)
        < 1.5 * error(codec.encode(keys.float(), values.float()), keys, values, query) + 1e-3
    )


def test_a_capsule_reads_as_its_layers_encode() -> None:
    """Tiles in their frames; what fills none is raw, and the segment holds keys, values and a bias, and no map."""
    built, of = capsule().double(), prefill(1)
    (segment, rest), text = built.compress(of)
    cos, sin = (x[:, [3, 13, 5]][0].chunk(2, dim=-1)[0] for x in of.position_embeddings)
    tiles = [(0, 3), (0, 13), (1, 5)]
    keys, values = (torch.stack([x[row][:, at : at + TILE] for row, at in tiles]) for x in (of.keys, of.values))
    frame = Frame(cos, sin)
    encoded = built.layers[1].encode(frame.unrotate(keys), values)
    query = rand(2, 4, 3, DIM, seed=7)
    expected = attend(query, [encoded.segment(torch.tensor([0, 0, 1]), frame), rest, *text], of.scale)
    torch.testing.assert_close(attend(query, [segment, rest, *text], of.scale), expected)
    assert segment.tokens == 4
    assert list(segment.parameter_tensors()) == []
    full = attend(query, [Segment(of.keys, of.values, torch.arange(2))], of.scale)
    assert not torch.allclose(expected, full, atol=1e-3)


def test_bytes_are_those_of_keys_values_and_bias() -> None:
    """Four of ten tokens of three tiles: rows of 2 x 8 numbers and a bias, the owners, and the frames' 2 x 4
    numbers."""
    of = prefill(1)
    of = replace(of, keys=of.keys.float(), values=of.values.float())
    (segment, _), _ = capsule(0.4).compress(of)
    frames = storage_bytes(iter(segment.frame.tensors()))
    assert storage_bytes(segment.entry_tensors()) == 3 * HEADS * 4 * (2 * DIM + 1) * 4 + 3 * 8 + frames
    (packed, _), _ = capsule(0.4, latent_bits=4).compress(of)
    codes, ranges, bias = 3 * HEADS * 2 * DIM * 4, 3 * HEADS * 2 * DIM * 2 * 4, 3 * HEADS * 4 * 4
    assert storage_bytes(packed.entry_tensors()) == codes + ranges + bias + 3 * 8 + frames


@pytest.mark.parametrize(
    "options", [{}, {"selector": "learned", "hidden": 5, "passes": 1}, {"latent_bits": 8}], ids=str
)
def test_save_and_load(options: dict[str, Any], tmp_path: Path) -> None:
    built, of = capsule(**options), prefill()
    of = replace(of, keys=of.keys.float(), values=of.values.float(), query=of.query.float())
    built.save_pretrained(tmp_path / "capsule")
    loaded = Capsule.from_pretrained(tmp_path / "capsule")
    assert loaded.config == built.config
    assert loaded.state_dict().keys() == built.state_dict().keys()
    query = rand(2, 4, 3, DIM, seed=7).float()
    outputs = [attend(query, [*c.compress(of).visual, *c.compress(of).text], of.scale) for c in (built, loaded)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_the_family_is_registered() -> None:
    assert FAMILIES["compact"].config is CompactConfig
    config = CompactConfig.from_dict({"tile": 8, "ratios": [0.5, 0.25], "selector": "learned"})
    assert config.ratios == (0.5, 0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratios": (0.5, 0.0)}, r"retention ratio 0.0 is outside \(0, 1\]"),
        ({"ratios": (0.5, 1.5)}, r"retention ratio 1.5 is outside \(0, 1\]"),
        ({"bank": 0}, "bank 0: at least 1"),
        ({"passes": -1}, "passes -1: at least 0"),
        ({"hidden": 0}, "hidden 0: at least 1"),
        ({"selector": "random"}, "selector 'random' is neither 'attention' nor 'learned'"),
        ({"ridge": 0.0}, "ridge 0.0 must be positive"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"latent_bits": 5}, "5 bits cannot be packed"),
    ],
)
def test_bad_sizes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompactConfig(TILE, **{"ratios": (0.5, 0.5), **options})


def test_a_ratio_for_every_layer() -> None:
    with pytest.raises(ValueError, match="3 retention ratios for 2 layers"):
        CompactConfig(TILE, ratios=(0.5,) * 3).build(GEOMETRY, 0)


def test_an_empty_bank_is_refused_before_anything_is_stored() -> None:
    built = Capsule(CapsuleConfig("compact", CompactConfig(TILE, ratios=(0.5, 0.5)), GEOMETRY, "tiny"))
    with pytest.raises(RuntimeError, match="bank of queries is empty"):
        built.compress(prefill())


@pytest.fixture
def harvested() -> LayerHarvest:
    """Two rows of a small prefill: three tiles, and the tokens behind the last image as queries."""
    recorder = Recorder(TILE)
    recorder.compress(prefill())
    return recorder.layers[0]


def test_the_bank_holds_queries_that_read_in_the_tiles_frames(harvested: LayerHarvest) -> None:
    """Row 0 has 3 queries behind its image and 2 tiles, row 1 has 15 and 1; two query heads share a KV head."""
    bank = QueryBank(2 * (2 * 3 + 15))
    bank.add(harvested)
    assert bank.seen == 42
    found = bank.bank()
    assert found.shape == (HEADS, 42, DIM)
    offered = []
    for tile, row in enumerate(harvested.owner.tolist()):
        query = harvested.query[row][:, harvested.reads[row]].float()
        offered.append(harvested.frame.select(torch.tensor([tile])).unrotate(query[None])[0].view(HEADS, -1, DIM))
    for head in range(HEADS):
        one, other = found[head].double(), torch.cat(offered, dim=1)[head].double()
        distance = (one[:, None] - other).norm(dim=-1)
        assert float(distance.amin(0).max()) < 1e-6
        assert float(distance.amin(1).max()) < 1e-6


def test_the_bank_prefers_queries_that_look_at_the_tile() -> None:
    """Of a hundred queries the first ten give the tile nearly all their attention, the others a hundredth."""
    keys = torch.zeros(1, 1, 4, 2)
    keys[..., 0] = 1.0
    query = torch.zeros(1, 1, 100, 2)
    query[:, :, :, 0] = -6.0
    query[:, :, :10, 0] = 6.0
    rest = Segment(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.tensor([0]))
    reads, visible = torch.ones(1, 100, dtype=torch.bool), torch.ones(1, 100, 4, dtype=torch.bool)
    bank = QueryBank(8)
    bank.add(LayerHarvest(keys, keys, torch.tensor([0]), None, query, reads, rest, visible, 0.75))
    assert (bank.bank()[0, :, 0] > 0).sum() == 8


def test_banks_are_seeded_and_merge(harvested: LayerHarvest) -> None:
    banks = [QueryBank(20, seed) for seed in (0, 0, 1)]
    for bank in banks:
        bank.add(harvested)
    assert torch.equal(banks[0].bank(), banks[1].bank())
    assert not torch.equal(banks[0].bank(), banks[2].bank())
    both = torch.cat([banks[0].priority, banks[2].priority], dim=1).sort(descending=True).values[:, :20]
    banks[0].merge(banks[2].queries, banks[2].priority)
    assert torch.equal(banks[0].priority, both)


def test_a_bank_that_cannot_be_filled_is_refused(harvested: LayerHarvest) -> None:
    bank = QueryBank(50)
    with pytest.raises(ValueError, match="bank of 50 queries cannot be filled from the 0"):
        bank.bank()
    bank.add(harvested)
    with pytest.raises(ValueError, match="bank of 50 queries cannot be filled from the 42"):
        bank.bank()


def test_a_bank_of_the_readers_serves_them(harvested: LayerHarvest) -> None:
    """Under the queries that filled the bank, half the tokens read nearly as all do."""
    bank = QueryBank(42)
    bank.add(harvested)
    codec = layer(0.5, bank=42).float()
    codec.bank.copy_(bank.bank())
    encoded = codec.encode(harvested.keys.float(), harvested.values.float())
    of = replace(harvested, keys=harvested.keys.float(), values=harvested.values.float(), query=harvested.query.float())
    kept = codec.choose(codec.bank_attention(of.keys), of.keys, of.values).kept
    errors = [
        output_error(of, e.segment(of.owner, of.frame), full_output(of))
        for e in (encoded, selected(of.keys, of.values, kept))
    ]
    assert errors[0] < 0.3 * errors[1]


def test_a_selector_learns_its_teachers_choice() -> None:
    """Every other token has a short key here, so that some of the choice can be learned from few tiles."""
    keys, values, _ = low_rank(48, noise=0.3)
    keys[:, :, ::2] *= 0.05
    codec = layer(0.25, tile=LONG, selector="learned", passes=0).float()
    chosen = chosen_by_teacher(codec, keys.float(), values.float())
    assert (chosen.sum(-1) == codec.stored).all()
    assert codec.selector is not None
    initialise(codec.selector, keys, values)

    def agreement() -> float:
        own = codec.choose(codec.bank_attention(keys.float()), keys.float(), values.float()).kept
        return float(chosen.gather(-1, own).float().mean())

    before = agreement()
    optimizer = torch.optim.Adam(codec.selector.requires_grad_(True).parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = imitation_loss(codec.selector, keys.float(), values.float(), chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert agreement() > before + 0.2


@pytest.mark.parametrize("selector", ["attention", "learned"])
def test_the_command_trains_a_compact_capsule(selector: str, tmp_path: Path) -> None:
    quick = [
        "--data.size",
        "48",
        "--held_out",
        "16",
        "--batch",
        "8",
        "--moment_batches",
        "2",
        "--codec.tile",
        "28",
        "--threads",
        "1",
    ]
    output = tmp_path / "compact"
    wanted = ["--compact.selector", selector, "--compact.steps", "3", "--compact.bank", "64", "--ratio", "5"]
    assert train(["compact", *quick, *wanted, "--output", str(output)]) == 0
    capsule = Capsule.from_pretrained(output)
    assert isinstance(capsule.config.codec, CompactConfig)
    assert capsule.config.codec.ratios == (0.2,) * 4
    assert json.loads((output / "metrics.json").read_text())["train"]["output_error"] < 0.2


def test_prefills_of_generate(
    model: Any, make_batch: Callable[..., Any], greedy: dict[str, Any], geometry: KVGeometry
) -> None:
    """At ratio 1 the model answers as with its full cache."""
    config = CompactConfig(49, ratios=(1.0,) * geometry.layers, bank=64)
    built = Capsule(CapsuleConfig("compact", config, geometry, "tiny"))
    for seed, codec in enumerate(built.layers):
        codec.bank.copy_(rand(*codec.bank.shape, seed=seed))
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    expected = model.generate(**batch, **greedy)
    with attach(model, built):
        found = model.generate(**batch, **greedy)
    assert torch.equal(found.sequences, expected.sequences)

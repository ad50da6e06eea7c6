"""Compact capsules: what is kept, what it stands for, how near attention stays, and the bank and selector behind it."""

from typing import Any

import pytest
import torch
from support.builders import DIM, HEADS, rand
from support.compact_layers import BANK, LONG, layer, low_rank, selected

from kvcapsule.codec import Encoded, compact
from kvcapsule.codec.attention_matching import fit_masses, marginal_gains, targets
from kvcapsule.codec.compact import CompactLayer
from kvcapsule.kernels.reference import attend
from kvcapsule.segments.segment import Segment
from kvcapsule.training.families.token_selector import greedy_choice


def error(encoded: Encoded, keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> float:
    """Relative squared error of attention's output over the tile and three raw tokens, which make the tile's mass
    matter."""
    owner = torch.arange(len(keys))
    text = Segment(rand(len(keys), HEADS, 3, DIM, seed=7), rand(len(keys), HEADS, 3, DIM, seed=8), owner)
    truth = attend(query, [Segment(keys, values, owner), text], DIM**-0.5)
    got = attend(query, [encoded.segment(owner, None), text], DIM**-0.5)
    return float((got - truth).square().sum() / truth.square().sum())


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

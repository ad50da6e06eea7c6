"""What `kvcapsule analyze` computes of tokens: similarity, spectra, bits and drift, each against what it must be on
data made for it."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from support.builders import DIM, HEADS, rand
from support.moments import moments_of, variances_of
from transformers import BatchFeature

from kvcapsule.codec.bit_allocation import water_fill
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.training.analysis.distortion import BITS, predict
from kvcapsule.training.analysis.drift import KEPT, MAX_STEPS, REFERENCES, Drift, attention_on
from kvcapsule.training.analysis.passes import Observer, watch
from kvcapsule.training.analysis.questions import Batch, answer_positions
from kvcapsule.training.analysis.report import over_steps
from kvcapsule.training.analysis.similarity import Similarity
from kvcapsule.training.analysis.spectrum import spectrum
from kvcapsule.vlm.spans import VisualSpan


def test_similarity_identical_tokens() -> None:
    found = Similarity()
    found.add(rand(HEADS, 1, DIM).expand(-1, 12, -1), width=4)
    for cosines in found.means():
        torch.testing.assert_close(cosines, torch.ones(HEADS, dtype=torch.float64))


def test_similarity_against_every_pair() -> None:
    found, images = Similarity(), [rand(HEADS, 12, DIM, seed=1), rand(HEADS, 6, DIM, seed=2)]
    beside, pairs = [], []
    for x, width in zip(images, (4, 3), strict=True):
        found.add(x, width)
        cosines = torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1)
        for i in range(x.shape[1]):
            beside += [cosines[:, i, i + 1]] if (i + 1) % width and i + 1 < x.shape[1] else []
            pairs += [cosines[:, i, j] for j in range(x.shape[1]) if i != j]
    torch.testing.assert_close(found.means().neighbours, torch.stack(beside).mean(0))
    torch.testing.assert_close(found.means().pairs, torch.stack(pairs).mean(0))


def test_similarity_the_mean_is_taken_off() -> None:
    mean, x = rand(HEADS, DIM), rand(HEADS, 12, DIM, seed=1)
    centred, raw = Similarity(mean), Similarity()
    centred.add(x + mean[:, None], 4)
    raw.add(x, 4)
    torch.testing.assert_close(centred.means(), raw.means())


def test_similarity_one_token_has_no_neighbour() -> None:
    found = Similarity()
    found.add(rand(HEADS, 1, DIM), 1)
    assert all(cosines.isnan().all() for cosines in found.means())


@pytest.mark.parametrize(
    ("values", "rank", "most", "nearly_all"),
    [
        ([1.0] * 10, 10.0, 9, 10),
        ([5.0] + [0.0] * 9, 1.0, 1, 1),
        ([4.0, 4.0] + [0.0] * 8, 2.0, 2, 2),
        ([0.9, 0.09, 0.01], math.exp(-(0.9 * math.log(0.9) + 0.09 * math.log(0.09) + 0.01 * math.log(0.01))), 1, 2),
        ([0.0] * 4, 0.0, 0, 0),
    ],
    ids=["flat", "one", "two", "by hand", "nothing"],
)
def test_spectrum_known_spectra(values: list[float], rank: float, most: int, nearly_all: int) -> None:
    turn = torch.linalg.qr(rand(len(values), len(values))).Q
    found = spectrum((turn @ torch.tensor(values, dtype=torch.float64).diag() @ turn.T)[None])
    assert found.effective_rank.item() == pytest.approx(rank, rel=1e-6)
    assert (found.components_90.item(), found.components_99.item()) == (most, nearly_all)
    shares = torch.tensor(values, dtype=torch.float64).cumsum(0) / max(sum(values), 1e-300)
    assert found.ranks == list(range(1, len(values) + 1))
    torch.testing.assert_close(found.energy, shares, atol=1e-9, rtol=0)


def test_spectrum_ranks_of_a_long_axis_are_few() -> None:
    ranks = spectrum(torch.eye(500)[None]).ranks
    assert (ranks[0], ranks[-1]) == (1, 500) and len(ranks) < 64 and ranks == sorted(set(ranks))


def test_spectrum_moments_agree_with_the_stacked_data() -> None:
    x = rand(7, HEADS, 5, DIM) + rand(1, HEADS, 1, DIM, seed=1)
    moments = moments_of(x)
    centred = x - x.mean((0, 2), keepdim=True)
    assert moments.tiles == 7
    torch.testing.assert_close(moments.tokens(), torch.einsum("ehtd,ehsd->hts", centred, centred) / 7)
    torch.testing.assert_close(moments.channels(), torch.einsum("ehtd,ehtf->hdf", centred, centred) / 7)
    assert moments.variance() == pytest.approx(centred.square().sum().item() / 7)
    assert moments.variance_within() == pytest.approx((x - x.mean(2, keepdim=True)).square().sum().item() / 7)


@pytest.mark.parametrize(
    ("variances", "bits", "level", "distortion"),
    [
        # Half of log2 of 16 / 1 is 2 bits for the first, none for the second, which lies at the level: a mean of 1.
        ([16.0, 1.0], 1.0, 1.0, 2.0),
        # 64 and 4 down to 2: 2.5 and 0.5 bits, a mean of 1 over three; the third lies below the level and keeps its 1.
        ([4.0, 64.0, 1.0], 1.0, 2.0, 5.0),
        ([3.0, 3.0], 2.0, 3 / 16, 6 / 16),
        ([5.0, 2.0, 1.0], 0.0, 5.0, 8.0),
        ([8.0, 0.0], 1.0, 0.5, 0.5),
        ([0.0, 0.0], 1.0, 0.0, 0.0),
    ],
)
def test_water_filling_by_hand(variances: list[float], bits: float, level: float, distortion: float) -> None:
    assert water_fill(torch.tensor(variances), bits) == pytest.approx((level, distortion))


@pytest.mark.parametrize("bits", BITS)
def test_water_filling_the_bits_are_spent(bits: float) -> None:
    variances = rand(2, 40, DIM).exp()
    level, distortion = water_fill(variances, bits)
    assert float((variances / level).clamp_min(1).log2().mean() / 2) == pytest.approx(bits)
    assert distortion == pytest.approx(float(variances.clamp_max(level).sum()))


def test_prediction_white_noise_has_nothing_to_transform() -> None:
    """Coefficients are alike then, and with ever more tiles both come to D(R)."""
    x = rand(4000, 1, 4, 4)
    moments, variances = moments_of(x), variances_of(x)
    for bits in BITS:
        found = predict(moments, variances, bits)
        assert found.transform == pytest.approx(2 ** (-2 * bits), rel=0.02)
        # A channel is centred about its mean over four tokens, which is a quarter of its variance.
        assert found.per_channel == pytest.approx(0.75 * 2 ** (-2 * bits), rel=0.02)


def test_prediction_one_component_takes_all_the_bits() -> None:
    """Tiles of one pattern and one factor each: R bits for every of T D elements are R T D for the factor."""
    x = rand(50, 1, 1, 1) * rand(1, 1, 6, 1, seed=1) * rand(1, 1, 1, DIM, seed=2)
    found = predict(moments_of(x), variances_of(x), 0.05)
    whole = moments_of(x).variance()
    assert found.transform == pytest.approx(float(variances_of(x).sum()) / whole * 2 ** (-2 * 0.05 * 6 * DIM), rel=1e-6)
    assert found.per_channel > 10 * found.transform
    # All tokens lie on one pattern along the tokens, or on two once the mean token is off: two rows of six hold them.
    assert predict(moments_of(x), variances_of(x), 16 * 2 / 6).token_pca == pytest.approx(0, abs=1e-9)


def test_prediction_what_all_tiles_share_costs_no_bits() -> None:
    x = 10 * rand(1, 1, 5, 4) + rand(200, 1, 5, 4, seed=1)
    assert predict(moments_of(x), variances_of(x), 0.2).transform < 0.05
    assert predict(moments_of(x[:1].expand(200, -1, -1, -1)), torch.zeros(1, 5, 4), 0.2).transform == 0


def test_prediction_nothing_varies() -> None:
    x = torch.zeros(40, 1, 5, 4)
    assert predict(moments_of(x), variances_of(x.double()), 0.2) == (0.0, 0.0, 0.0)


def test_drift_constant_attention_stays() -> None:
    drift, attention = Drift(), rand(20, seed=3).exp()
    drift.add(attention.expand(5, -1), 7 * attention)
    drift.add(attention.expand(3, -1), attention)
    ones = torch.ones(5, dtype=torch.float64)
    assert drift.steps == 5 and drift.questions[:6].tolist() == [2, 2, 2, 1, 1, 0]
    for by in REFERENCES:
        torch.testing.assert_close(drift.curve("overlap", by, 0.1), ones)
    for kept in KEPT:
        best = attention.sort(descending=True).values[: round(kept * 20)].sum() / attention.sum()
        for by in (*REFERENCES, "best"):
            torch.testing.assert_close(drift.curve("held", by, kept), ones * best)


def test_drift_uniform_attention_overlaps_with_itself() -> None:
    drift = Drift()
    drift.add(torch.ones(4, 30), torch.ones(30))
    assert drift.curve("overlap", "post_vision", 0.1).tolist() == [1.0] * 4
    assert drift.curve("held", "best", 0.4).tolist() == pytest.approx([0.4] * 4)


def test_drift_attention_that_moves_on() -> None:
    """Of 20 tokens the top two: both, one of them, none. What was on the first two is then nowhere."""
    steps = torch.full((3, 20), 1e-3)
    for step, tokens in enumerate(([0, 1], [1, 2], [2, 3])):
        steps[step, tokens] = 1.0
    drift = Drift()
    drift.add(steps, steps[0])
    assert drift.curve("overlap", "last_prompt_token", 0.1).tolist() == pytest.approx([1, 1 / 3, 0])
    assert drift.curve("held", "post_vision", 0.1).tolist() == pytest.approx([2 / 2.018, 1.001 / 2.018, 0.002 / 2.018])
    assert drift.curve("held", "best", 0.1).tolist() == pytest.approx([2 / 2.018] * 3)
    assert drift.curve("visual_mass").tolist() == pytest.approx([2.018] * 3)


def test_drift_long_answers_are_cut() -> None:
    drift = Drift()
    drift.add(torch.ones(MAX_STEPS + 40, 10), torch.ones(10))
    assert drift.steps == MAX_STEPS + 1


def test_drift_attention_is_the_models_own(model, make_batch: Callable[..., BatchFeature]) -> None:
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    batch = make_batch((1, "Read line 2."), (1, "Transcribe the page. And more words."))
    with torch.no_grad():
        wanted = eager(**batch, output_attentions=True).attentions
    seen: list[torch.Tensor] = []

    def visit(of: LayerPrefill, tiles: object) -> None:
        places = range(of.keys.shape[2] - 3, of.keys.shape[2])
        seen.append(attention_on(of.query[0][:, -3:], of.keys[0], places, of.valid[0], of.scale))

    spans = [VisualSpan(0, 0, 196, (1, 14, 14))]
    watch(model, Batch(batch, spans, []), Observer(49, True, visit))
    assert len(seen) == len(wanted) == 4
    for mine, theirs in zip(seen, wanted, strict=True):
        torch.testing.assert_close(mine, theirs[0, :, -3:].mean(0), atol=1e-5, rtol=1e-4)


def test_drift_answers_are_found_behind_padding() -> None:
    prompts = BatchFeature(
        {
            "input_ids": torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
        }
    )
    rows = [[0, 0, 0, 5, 6, 9, 9, 2], [5, 6, 7, 8, 9, 2, 2, 1]]
    full = BatchFeature(
        {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[0, 0, 0] + [1] * 5, [1] * 8])}
    )
    assert answer_positions(prompts, full, {2}) == [range(5, 7), range(4, 5)]
    assert answer_positions(prompts, full, {3}) == [range(5, 8), range(4, 8)]


def test_drift_means_over_steps_weigh_questions() -> None:
    assert over_steps({"questions": [4, 3, 1]}, [9.0, 1.0, 5.0]) == pytest.approx(2.0)
    assert over_steps({"questions": [4]}, [9.0]) is None

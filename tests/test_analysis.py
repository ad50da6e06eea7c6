"""`kvcapsule analyze`: each figure against what it must be on data made for it, the JSON contract, and what is refused."""

import copy
import json
import math
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import DIM, HEADS, prefill, rand
from running import tiny_gemma, tiny_qwen
from transformers import BatchFeature

from kvcapsule.cli import results
from kvcapsule.cli.errors import InputError
from kvcapsule.cli.results import write_whole
from kvcapsule.frame import Frame
from kvcapsule.prefill import LayerPrefill, cut_tiles
from kvcapsule.spans import VisualSpan, find_spans
from kvcapsule.training.analysis import passes, questions
from kvcapsule.training.analysis.config import AnalyzeConfig
from kvcapsule.training.analysis.distortion import BITS, predict, water_fill
from kvcapsule.training.analysis.drift import KEPT, MAX_STEPS, REFERENCES, Drift, attention_on
from kvcapsule.training.analysis.layer import LayerStudy
from kvcapsule.training.analysis.main import main
from kvcapsule.training.analysis.passes import Observer, one_size, watch
from kvcapsule.training.analysis.plot import PICTURES
from kvcapsule.training.analysis.questions import Batch, answer_places
from kvcapsule.training.analysis.report import heading, over_steps, tables
from kvcapsule.training.analysis.similarity import Similarity
from kvcapsule.training.analysis.spectrum import TileMoments, spectrum
from kvcapsule.training.analysis.study import _rounded
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.training.spectra import CoefficientMoments

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "analyze.md"
QUICK = ["--device", "cpu", "--questions", "8", "--tile", "49"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory, model, processor) -> str:
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def moments_of(x_EHTD: torch.Tensor) -> TileMoments:
    moments = TileMoments(*x_EHTD.shape[1:], CPU)
    for part in x_EHTD.split(300):
        moments.add(part)
    return moments


def variances_of(x_EHTD: torch.Tensor) -> torch.Tensor:
    gathered = CoefficientMoments(*x_EHTD.shape[1:])
    gathered.add(moments_of(x_EHTD).moments.bases().coefficients(x_EHTD))
    return gathered.variance()


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
        {"input_ids": torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4])}
    )
    rows = [[0, 0, 0, 5, 6, 9, 9, 2], [5, 6, 7, 8, 9, 2, 2, 1]]
    full = BatchFeature({"input_ids": torch.tensor(rows), "attention_mask": torch.tensor([[0, 0, 0] + [1] * 5, [1] * 8])})
    assert answer_places(prompts, full, {2}) == [range(5, 7), range(4, 5)]
    assert answer_places(prompts, full, {3}) == [range(5, 8), range(4, 8)]


def test_drift_means_over_steps_weigh_questions() -> None:
    assert over_steps({"questions": [4, 3, 1]}, [9.0, 1.0, 5.0]) == pytest.approx(2.0)
    assert over_steps({"questions": [4]}, [9.0]) is None


def turned() -> LayerPrefill:
    """Keys that are one vector and its double, each token turned by an angle of its own."""
    of = prefill()
    cos, sin = (part.expand(2, -1, -1) for part in (rand(1, 30, 4, seed=4).cos(), rand(1, 30, 4, seed=4).sin()))
    frame = Frame(cos[0], sin[0])
    length = 1 + (torch.arange(30) % 2)[:, None, None]
    keys = frame.forward(rand(1, HEADS, DIM).expand(30, -1, -1) * length).transpose(0, 1).expand(2, -1, -1, -1)
    embeddings = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    return LayerPrefill(3, of.query, keys, of.values, of.spans, of.valid, of.scale, embeddings)


def studied(of: LayerPrefill, tile: int, canonical: bool = True, batches: int = 2) -> LayerStudy:
    study = LayerStudy(of)
    for visit in (lambda p, t: study.first(p, t, [range(28, 30)] * 2), study.second):
        for _ in range(batches):
            Observer(tile, canonical, visit).compress(of)
    return study


def test_layer_what_rotation_costs_in_rank() -> None:
    found = studied(turned(), 1).result()["spectra"]["keys"]
    # A tile of one token is turned back whole: a vector and its double, about their mean, have one direction.
    for name in ("channels", "channels_unrotated"):
        assert found[name]["effective_rank"] == pytest.approx([1.0] * HEADS, abs=1e-6)
    assert min(found["channels_rotated"]["effective_rank"]) > 3
    tiles_of_six = studied(turned(), 6).result()["spectra"]["keys"]
    assert min(tiles_of_six["channels"]["effective_rank"]) > 2


def test_layer_without_frames_keys_are_as_rotated() -> None:
    found = studied(turned(), 1, canonical=False).result()["spectra"]["keys"]
    assert found["channels_unrotated"] is None
    assert found["channels"]["effective_rank"] == pytest.approx(found["channels_rotated"]["effective_rank"])


def test_layer_tokens_of_no_tile_count_where_no_tile_is_asked_for() -> None:
    of = prefill()
    study = studied(of, 10)
    # Spans of 24 and 10 tokens: three tiles, and four tokens left.
    assert study.count == 2 * 3 and study.tokens["keys"].count == 2 * 34
    raw = Similarity()
    for span in of.spans:
        raw.add(of.keys[span.row, :, span.start : span.start + span.length], span.grid[2])
    assert study.result()["similarity"]["keys"]["pairs"] == pytest.approx(raw.means().pairs.tolist())


def test_layer_batches_add_up() -> None:
    """The same batch twice is the same study, but for the variances' freedom."""
    once, twice = studied(prefill(), 5, batches=1), studied(prefill(), 5, batches=2)
    assert twice.count == 2 * once.count == 2 * 6
    for part in ("similarity", "spectra"):
        assert_alike(once.result()[part], twice.result()[part])
    torch.testing.assert_close(once.drift.curve("held", "best", 0.4), twice.drift.curve("held", "best", 0.4))


def test_layer_variances_are_free_of_the_mean_they_are_about() -> None:
    """Bases turn the tiles and leave the sum of their variances, each with one degree of freedom less than there are tiles."""
    study, tiles = studied(prefill(), 5, batches=1), cut_tiles(prefill(), 5)
    assert tiles is not None and tiles.frame is not None
    for of, x in (("keys", tiles.frame.back(tiles.keys)), ("values", tiles.values)):
        whole = (x - x.mean((0, 2), keepdim=True)).square().sum() / len(x)
        fixed = max(0.0, 1 - float(x.var(0).sum() / whole))
        assert study.result()["fixed_share"][of] == pytest.approx(fixed)
        assert study.predicted()[-1][of]["transform"] <= 1 - fixed


def test_layer_follows_the_answer_from_the_last_prompt_token_on() -> None:
    of = prefill()
    study, spans = LayerStudy(of), {span.row: span for span in of.spans}
    study.first(of, None, [range(28, 30), range(25, 26)])
    masses, scores = [], []
    for row, places in ((0, range(27, 30)), (1, range(24, 26))):
        run = slice(spans[row].start, spans[row].start + spans[row].length)
        masses.append(attention_on(of.query[row][:, list(places)], of.keys[row], places, of.valid[row], of.scale)[:, run].sum(1).double())
        asks = range(run.stop, places[1])
        scores.append(attention_on(of.query[row][:, list(asks)], of.keys[row], asks, of.valid[row], of.scale)[:, run].sum(0))
    wanted = torch.stack([(masses[0][0] + masses[1][0]) / 2, (masses[0][1] + masses[1][1]) / 2, masses[0][2]])
    torch.testing.assert_close(study.drift.curve("visual_mass"), wanted)
    assert study.drift.questions[:4].tolist() == [2, 2, 1, 0]
    alone = Drift()
    for row, places in ((0, range(27, 30)), (1, range(24, 26))):
        run = slice(spans[row].start, spans[row].start + spans[row].length)
        seen = attention_on(of.query[row][:, list(places)], of.keys[row], places, of.valid[row], of.scale)
        alone.add(seen[:, run], scores[row])
    torch.testing.assert_close(study.drift.curve("held", "post_vision", 0.25), alone.curve("held", "post_vision", 0.25))


def test_layer_has_no_drift_where_the_answer_is_not_known() -> None:
    study = LayerStudy(prefill())
    study.first(prefill(), None, [range(0), range(15, 20)])
    assert study.drift.steps == 0


@pytest.mark.parametrize(("family", "layers"), [(tiny_qwen, [0, 1]), (tiny_gemma, [1, 3])], ids=["mrope", "sliding"])
def test_layer_of_other_families(family: Callable[[], tuple[Any, dict[str, torch.Tensor]]], layers: list[int]) -> None:
    """Sections of M-RoPE turn back each by its own position; layers with a window are not studied."""
    built, inputs = family()
    tokens = inputs["input_ids"].shape[1]
    batch = Batch(BatchFeature(inputs), find_spans(built.config, inputs["input_ids"], inputs), [range(tokens - 1, tokens)])
    studies: dict[int, LayerStudy] = {}

    def first(of: LayerPrefill, tiles: LayerHarvest | None) -> None:
        studies.setdefault(of.layer, LayerStudy(of)).first(of, tiles, batch.answers)
        alone = cut_tiles(of, 1)
        assert alone is not None and alone.frame is not None
        torch.testing.assert_close(alone.frame.forward(alone.frame.back(alone.keys)), alone.keys)

    watch(built.eval(), batch, Observer(8, True, first))
    watch(built, batch, Observer(8, True, lambda of, tiles: studies[of.layer].second(of, tiles)))
    assert sorted(studies) == layers
    for study in studies.values():
        keys = study.result()["spectra"]["keys"]
        assert study.count == 4
        assert keys["channels_unrotated"]["effective_rank"] != pytest.approx(keys["channels_rotated"]["effective_rank"], rel=1e-3)


@pytest.mark.parametrize(("name", "says"), [("keys", "keys of visual"), ("values", "values of visual"), ("query", "queries behind")])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_layer_what_is_no_number_is_named(name: str, says: str, bad: float) -> None:
    of = prefill(layer=5)
    getattr(of, name)[0, 0, 29 if name == "query" else 4, 0] = bad
    with pytest.raises(InputError, match=rf"layer 5: the {says}.*float64"):
        LayerStudy(of).first(of, None, [range(28, 30)] * 2)


def test_layer_padding_may_hold_anything() -> None:
    of = prefill()
    of.valid[0, :2] = False
    of.keys[0, :, :2] = of.query[0, :, :2] = float("nan")
    LayerStudy(of).first(of, None, [range(28, 30)] * 2)


def test_layer_rotations_that_have_no_frame_are_refused_with_the_way_out() -> None:
    of = prefill()
    odd = tuple(part[..., : DIM // 2].repeat_interleave(2, -1).roll(1, -1) for part in of.position_embeddings or ())
    of = LayerPrefill(0, of.query, of.keys, of.values, of.spans, of.valid, of.scale, odd)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="--canonical_frame false"):
        Observer(5, True, lambda prefill, tiles: None).compress(of)
    Observer(5, False, lambda prefill, tiles: None).compress(of)


def assert_alike(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert one == pytest.approx(other, abs=1e-9, nan_ok=True)
    else:
        assert one == other


@pytest.fixture(scope="module")
def run(vlm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """A study of the tiny VLM: its JSON object, the folder of its files and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    with redirect_stdout(StringIO()) as printed:
        assert main(["--model", vlm, *QUICK, "--json", str(folder / "new" / "study.json"), "--plots", str(folder / "plots")]) == 0
    return json.loads((folder / "new" / "study.json").read_text()), folder, printed.getvalue()


SPECTRUM = {"effective_rank", "components_90", "components_99", "ranks", "energy"}
TOP = {"model", "geometry", "data", "versions", "seed", "machine", "tile", "layers", "drift", "predicted"}
TOP |= {"questions", "tiles", "frame", "revision", "dtype", "command"}


def test_contract_keys(run) -> None:
    found, _, _ = run
    assert set(found) == TOP
    assert set(found["geometry"]) == {"model_type", "layers", "query_heads", "kv_heads", "head_dim", "rotary"}
    assert set(found["data"]) == {"source", "split", "size", "seed", "image", "prompt", "answer", "task"}
    assert set(found["versions"]) == {"python", "kvcapsule", "torch", "transformers", "datasets"}
    assert set(found["machine"]) == {"cpu", "cores", "threads", "memory_gib", "accelerator"}
    assert (found["tile"], found["questions"], found["tiles"], found["frame"]) == (49, 8, 32, "canonical")
    assert (found["seed"], found["revision"], found["dtype"], found["geometry"]["rotary"]) == (0, None, "float32", "1d")
    assert found["data"]["size"] == 8


def test_contract_layers(run) -> None:
    found, _, _ = run
    assert [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3]
    for layer in found["layers"]:
        assert set(layer) == {"layer", "similarity", "spectra", "fixed_share"}
        assert set(layer["fixed_share"]) == set(layer["similarity"]) == set(layer["spectra"]) == {"keys", "values"}
        for of in ("keys", "values"):
            assert 0 <= layer["fixed_share"][of] < 1
            similarity = layer["similarity"][of]
            assert set(similarity) == {"neighbours", "pairs", "neighbours_centred", "pairs_centred"}
            assert all(len(heads) == 2 and all(-1 <= value <= 1 for value in heads) for heads in similarity.values())
        assert set(layer["spectra"]["keys"]) == {"tokens", "channels", "channels_rotated", "channels_unrotated"}
        assert set(layer["spectra"]["values"]) == {"tokens", "channels"}
        for of, name, size in (("keys", "tokens", 49), ("keys", "channels", 32), ("values", "tokens", 49)):
            found_spectrum = layer["spectra"][of][name]
            assert set(found_spectrum) == SPECTRUM
            assert found_spectrum["ranks"][-1] == size and found_spectrum["energy"][-1] == pytest.approx(1)
            for most, nearly_all in zip(found_spectrum["components_90"], found_spectrum["components_99"], strict=True):
                assert 1 <= most <= nearly_all <= size
            assert all(1 <= rank <= size for rank in found_spectrum["effective_rank"])


def test_contract_drift(run) -> None:
    drift = run[0]["drift"]
    assert set(drift) == {"steps", "questions", "top", "kept", "layers"}
    steps = len(drift["steps"])
    assert drift["steps"] == list(range(steps)) and drift["questions"][0] == 8 and len(drift["questions"]) == steps > 10
    assert (drift["top"], drift["kept"]) == (0.1, [0.1, 0.25, 0.4])
    for layer in drift["layers"]:
        assert set(layer) == {"layer", "visual_mass", "overlap", "held"}
        assert set(layer["overlap"]) == {"last_prompt_token", "post_vision"}
        assert set(layer["held"]) == {"last_prompt_token", "post_vision", "best"}
        assert layer["overlap"]["last_prompt_token"][0] == 1
        curves = [layer["visual_mass"], *layer["overlap"].values(), *(curve for curves in layer["held"].values() for curve in curves)]
        assert all(len(curve) == steps and all(0 <= value <= 1 for value in curve) for curve in curves)
        for by in REFERENCES:
            for curve, best in zip(layer["held"][by], layer["held"]["best"], strict=True):
                assert all(mine <= most + 1e-6 for mine, most in zip(curve, best, strict=True))


def test_contract_predicted(run) -> None:
    found, _, _ = run
    assert [(entry["layer"], entry["bits"]) for entry in found["predicted"]] == [(i, bits) for i in range(4) for bits in BITS]
    for entry in found["predicted"]:
        assert set(entry) == {"layer", "bits", "compression", "keys", "values"}
        assert entry["compression"] * entry["bits"] == pytest.approx(16)
        for of in ("keys", "values"):
            assert set(entry[of]) == {"transform", "per_channel", "token_pca"}
            assert 0 < entry[of]["transform"] < min(entry[of]["per_channel"], entry[of]["token_pca"]) < 1


def test_contract_numbers_are_short_and_json() -> None:
    assert _rounded({"a": [float("nan"), 0.123456789, 7], "b": float("inf"), "c": None}) == {"a": [None, 0.123457, 7], "b": None, "c": None}


def test_contract_command_names_no_place(run) -> None:
    command = run[0]["command"]
    assert command.startswith("kvcapsule analyze --model ") and "/" not in command


def test_contract_the_document_names_every_key(run) -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE))

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    assert keys(run[0]) == named


def test_contract_files_are_whole_and_alone(run) -> None:
    _, folder, _ = run
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == sorted(["new/study.json", *(f"plots/{name}.png" for name in PICTURES)])
    assert all((folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in PICTURES)


def test_contract_what_is_printed(run) -> None:
    found, _, printed = run
    assert heading(found) in printed and "rotary 1d" in heading(found) and "32 tiles of 49 visual tokens" in heading(found)
    shown = tables(found)
    assert [str(table.title) in printed for table in shown] == [True] * 4
    assert [table.row_count for table in shown] == [4, 4, 4, 4 + 3]
    assert "RoPE: 1d" in str(shown[1].title)


def test_pages_vlm_reads_on_while_prefill_stays(tmp_path: Path) -> None:
    """The shipped model transcribes: what it reads moves on, and a small share of the tokens chosen at prefill cannot hold it."""
    words = ["--device", "cpu", "--questions", "8", "--tile", "28", "--data.split", "validation", "--json", str(tmp_path / "a.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    last = found["drift"]["layers"][-1]
    held, best = (over_steps(found["drift"], last["held"][by][0]) for by in ("post_vision", "best"))
    assert held is not None and best is not None and held < 0.75 * best
    assert sum(last["overlap"]["last_prompt_token"][1:6]) / 5 < 0.4
    for layer in found["layers"]:
        keys = layer["spectra"]["keys"]
        ranks = [sum(keys[name]["effective_rank"]) for name in ("channels_unrotated", "channels", "channels_rotated")]
        assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tile", "300"], "no image fills a tile of 300: the largest has 196 visual tokens"),
        (["--tile", "-1"], "--tile -1"),
        (["--tile", "0"], "--questions 49 or more"),
        (["--tile", "98"], "gave 16 tiles of 98 visual tokens, too few for a stable basis, which asks for 32"),
        (["--questions", "7"], "at least 8"),
        (["--data.size", "5"], "5 questions (of pages, split 'train'): a study needs at least 8"),
        (["--batch", "0"], "--batch 0"),
        (["--device", "nowhere"], "--device nowhere cannot be used here"),
        (["--data.split", "dev"], "train, validation, test"),
        (["--data.colour", "red"], "data.colour"),
        (["--model", "no/such-model"], "cannot load the model"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_refused_one_clear_line(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    model = [] if "--model" in words else ["--model", vlm]
    assert main([*model, *QUICK, "--json", str(tmp_path / "a.json"), *words]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("kvcapsule analyze: ") and says in last
    assert not (tmp_path / "a.json").exists()


def test_refused_unknown_columns(vlm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "data.json"
    source.write_text("\n".join([json.dumps({"image": "x.png", "question": "What?", "answer": "no"})] * 8))
    assert main(["--model", vlm, *QUICK, "--data.source", str(source)]) == 2
    assert "no column 'prompt'; it has image, question, answer" in capsys.readouterr().err


@pytest.mark.parametrize("tile", ["0", "49"])
def test_refused_no_visual_tokens(vlm: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tile: str) -> None:
    monkeypatch.setattr(questions, "images_of", lambda row, index: [])
    assert main(["--model", vlm, *QUICK, "--tile", tile]) == 2
    assert "llava: its prompts hold no visual tokens, so there is nothing to study." in capsys.readouterr().err


@pytest.mark.parametrize("tensor", ["k_proj", "v_proj"])
def test_refused_weights_that_are_no_numbers(model, processor, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str) -> None:
    broken = copy.deepcopy(model)
    getattr(broken.model.language_model.layers[2].self_attn, tensor).weight[3, 5] = float("nan")
    broken.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), *QUICK]) == 2
    name = {"k_proj": "keys", "v_proj": "values"}[tensor]
    assert f"layer 2: the {name} of visual tokens hold NaN or infinity in float32" in capsys.readouterr().err


def test_refused_outputs_that_have_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded."""
    monkeypatch.setattr("kvcapsule.training.analysis.main.run", lambda *_: pytest.fail("studied all the same"))
    (tmp_path / "file").touch()
    for words in (["--json", f"{tmp_path}/file/a.json"], ["--plots", f"{tmp_path}/file"], ["--json", str(tmp_path)]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot be written" in line or "is a folder" in line


def test_refused_a_failure_to_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    write_whole(target, b"old")

    def full(path: Path, content: bytes) -> None:
        path.write_bytes(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results, "write", full)
    with pytest.raises(InputError, match=r"a\.json cannot be written: No space left on device"):
        write_whole(target, b"new")
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.json"]


def test_refused_whole_images_of_several_sizes() -> None:
    assert one_size({196}) == 196
    with pytest.raises(InputError, match=r"images of 64, 196 visual tokens.*--tile 64"):
        one_size({196, 64})


@pytest.mark.parametrize(("tile", "dim", "needed"), [(576, 128, 36), (2880, 128, 180), (14, 128, 74), (16, 16, 32)])
def test_refused_few_samples_say_how_many_would_do(tile: int, dim: int, needed: int) -> None:
    passes._require_samples(needed, tile, tile, needed, dim)
    with pytest.raises(InputError, match=f"asks for {needed} .*--questions {math.ceil(needed / 2)} or more"):
        passes._require_samples(needed - 1, tile, tile, (needed - 1) // 2, dim)


def test_batches_and_seed_change_nothing(run, vlm: str, tmp_path: Path) -> None:
    """Other batches are padded otherwise, which moves positions; the tiles' frames take that back."""
    assert main(["--model", vlm, *QUICK, "--batch", "3", "--seed", "1", "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    for one, other in zip(found["predicted"], run[0]["predicted"], strict=True):
        for of in ("keys", "values"):
            assert one[of] == pytest.approx(other[of], rel=1e-3)
    for one, other in zip(found["drift"]["layers"], run[0]["drift"]["layers"], strict=True):
        assert one["visual_mass"] == pytest.approx(other["visual_mass"], rel=1e-3)


def test_defaults() -> None:
    config = AnalyzeConfig()
    assert (config.tile, config.questions, config.data.source, config.data.split) == (0, 64, "pages", "train")


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in ("The frozen VLM", "Visual tokens of a tile", "Questions that are harvested", "Column with the question", "four pictures"):
        assert words in text

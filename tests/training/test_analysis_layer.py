"""The study of one layer: what rotation costs, what its batches add up to, what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.builders import DIM, HEADS, prefill, rand
from support.run_vlm import tiny_gemma, tiny_qwen
from transformers import BatchFeature

from kvcapsule.errors import InputError
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.tiles import cut_tiles
from kvcapsule.segments.rotary_frame import Frame
from kvcapsule.training.analysis.drift import Drift, attention_on
from kvcapsule.training.analysis.layer import LayerStudy
from kvcapsule.training.analysis.passes import Observer, watch
from kvcapsule.training.analysis.questions import Batch
from kvcapsule.training.analysis.similarity import Similarity
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.vlm.spans import find_spans


def turned() -> LayerPrefill:
    """Keys that are one vector and its double, each token turned by an angle of its own."""
    of = prefill()
    cos, sin = (part.expand(2, -1, -1) for part in (rand(1, 30, 4, seed=4).cos(), rand(1, 30, 4, seed=4).sin()))
    frame = Frame(cos[0], sin[0])
    length = 1 + (torch.arange(30) % 2)[:, None, None]
    keys = frame.rotate(rand(1, HEADS, DIM).expand(30, -1, -1) * length).transpose(0, 1).expand(2, -1, -1, -1)
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
    """Bases turn the tiles and leave the sum of their variances, each with one degree of freedom less than there are
    tiles."""
    study, tiles = studied(prefill(), 5, batches=1), cut_tiles(prefill(), 5)
    assert tiles is not None and tiles.frame is not None
    for of, x in (("keys", tiles.frame.unrotate(tiles.keys)), ("values", tiles.values)):
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
        masses.append(
            attention_on(of.query[row][:, list(places)], of.keys[row], places, of.valid[row], of.scale)[:, run]
            .sum(1)
            .double()
        )
        asks = range(run.stop, places[1])
        scores.append(
            attention_on(of.query[row][:, list(asks)], of.keys[row], asks, of.valid[row], of.scale)[:, run].sum(0)
        )
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
    batch = Batch(
        BatchFeature(inputs), find_spans(built.config, inputs["input_ids"], inputs), [range(tokens - 1, tokens)]
    )
    studies: dict[int, LayerStudy] = {}

    def first(of: LayerPrefill, tiles: LayerHarvest | None) -> None:
        studies.setdefault(of.layer, LayerStudy(of)).first(of, tiles, batch.answers)
        alone = cut_tiles(of, 1)
        assert alone is not None and alone.frame is not None
        torch.testing.assert_close(alone.frame.rotate(alone.frame.unrotate(alone.keys)), alone.keys)

    watch(built.eval(), batch, Observer(8, True, first))
    watch(built, batch, Observer(8, True, lambda of, tiles: studies[of.layer].second(of, tiles)))
    assert sorted(studies) == layers
    for study in studies.values():
        keys = study.result()["spectra"]["keys"]
        assert study.count == 4
        assert keys["channels_unrotated"]["effective_rank"] != pytest.approx(
            keys["channels_rotated"]["effective_rank"], rel=1e-3
        )


@pytest.mark.parametrize(
    ("name", "says"), [("keys", "keys of visual"), ("values", "values of visual"), ("query", "queries behind")]
)
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

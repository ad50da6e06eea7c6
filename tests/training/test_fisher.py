"""What the logits feel: gradients through the frozen VLM, their second moments, and the metric that a code is solved
in."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.builders import rand

from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.segments.segment import Segment
from kvcapsule.training.datamodule import Batch, Questions
from kvcapsule.training.families.cross_layer import Coordinates, CrossLayerFit
from kvcapsule.training.fisher import MIX, FisherSums, GradientSink, Mixture, each_gradient
from kvcapsule.training.frozen_forward import answer_mask, logits_reading, logits_through
from kvcapsule.training.harvest import LayerHarvest, Recorder, harvest
from kvcapsule.training.question_forward import Surroundings, question_logits
from kvcapsule.training.second_moments import Moments
from kvcapsule.training.tile_sample import LayerTiles
from kvcapsule.vlm.loading import load_vlm

TILE = 28


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return load_vlm("pages-vlm", None, "float32", "cpu")[0]


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    """Three questions with answers of unlike length; the last one alone; all of them in fp32."""
    _, processor = load_vlm("pages-vlm", None, "float32", "cpu")
    rows = source.load(SourceConfig(source="pages", split="validation", size=3))
    of = {"all": rows, "last": rows.select([2])}
    return {name: next(iter(Questions(r, r, processor, batch=3).val_dataloader())) for name, r in of.items()}


def read(layers: list[LayerHarvest]) -> list[Segment]:
    """Every tile as it is."""
    return [Segment(layer.keys, layer.values, layer.owner, frame=layer.frame) for layer in layers]


def felt_by(
    model: torch.nn.Module,
    batch: Batch,
    seeds: list[int],
    layers: list[LayerHarvest] | None = None,
    whole: bool = False,
) -> list[LayerTiles]:
    """Gradients in place of keys and values; whole: through a forward of all tokens."""
    layers = layers or harvest(model, batch.inputs, TILE)
    around, found = [Surroundings.of(layer) for layer in layers], {}

    def forward(readings, last: int) -> torch.Tensor:
        if whole:
            return logits_reading(model, batch.inputs, Recorder(TILE), readings, last)
        return question_logits(model, batch.inputs, readings, around, last)

    sink = GradientSink([range(len(layers))], range(len(layers)), lambda number, own: found.update({number: own}))
    each_gradient(forward, read(layers), batch.answers, seeds, sink.take)
    return found[0]


def test_gradients_are_how_the_drawn_tokens_log_probability_moves(model, batches) -> None:
    """Along the gradient of one layer's values, by finite differences: what the drawn tokens are follows from the same
    seeds."""
    batch, seeds = batches["all"], [5, 6, 7]
    layers = harvest(model, batch.inputs, TILE)
    found = felt_by(model, batch, seeds, layers)
    last = int(batch.answers.max()) + 1
    predict = answer_mask(batch.answers, last)

    def log_p(segments: list[Segment]) -> torch.Tensor:
        with torch.no_grad():
            return logits_through(model, batch.inputs, TILE, True, segments, last)[predict].double().log_softmax(-1)

    drawn = torch.cat(
        [
            torch.rand(int(n), generator=torch.Generator().manual_seed(s))
            for n, s in zip(batch.answers, seeds, strict=True)
        ]
    )
    chosen = torch.searchsorted(log_p(read(layers)).exp().cumsum(-1), drawn.double()[:, None])
    for index in (0, 2):
        size = found[index].values.square().sum().double()
        ends = []
        for sign in (1, -1):
            moved = [*layers]
            moved[index] = replace(
                layers[index], values=layers[index].values + sign * 0.01 * found[index].values / size.sqrt().float()
            )
            ends.append(log_p(read(moved)).gather(1, chosen).sum())
        assert float(ends[0] - ends[1]) / 0.02 == pytest.approx(float(size.sqrt()), rel=0.02)


def test_a_row_has_the_same_gradients_in_any_batch(model, batches) -> None:
    several, one = felt_by(model, batches["all"], [5, 6, 7]), felt_by(model, batches["last"], [7])
    owner = harvest(model, batches["all"].inputs, TILE)[0].owner
    for layer, alone in zip(several, one, strict=True):
        own = owner == 2
        for name in ("keys", "values"):
            torch.testing.assert_close(getattr(layer, name)[own], getattr(alone, name), atol=1e-4, rtol=1e-3)


def test_what_no_logit_can_feel_has_no_gradient(model, batches) -> None:
    """The output of the query heads that read one KV head goes nowhere in layer 1."""
    attention = model.model.language_model.layers[1].self_attn
    weight = attention.o_proj.weight
    kept = weight.data.clone()
    half = weight.shape[1] // 2
    try:
        weight.data[:, half:] = 0
        found = felt_by(model, batches["last"], [0])
    finally:
        weight.data.copy_(kept)
    for name in ("keys", "values"):
        gradient = getattr(found[1], name)
        assert not bool(gradient[:, 1].any()) and bool(gradient[:, 0].any())


def test_tokens_are_drawn_from_what_the_model_says(model, batches) -> None:
    """With a flat distribution other seeds draw other tokens, and none of them are just the likeliest."""
    batch, head = batches["last"], model.lm_head.weight
    kept = head.data.clone()
    try:
        head.data.mul_(0.02)
        several = [felt_by(model, batch, [seed])[0].values for seed in range(40)]
        spread = torch.stack(several).std(0).mean() / torch.stack(several).abs().mean()
        mean = torch.stack(several).mean(0).square().mean() / torch.stack(several).square().mean()
    finally:
        head.data.copy_(kept)
    assert float(spread) > 0.5, "of 40 draws"
    assert float(mean) < 0.3, (
        "log p(y) has no slope in the mean over y ~ p: what is left of 40 draws is a fortieth of their size"
    )


def test_the_images_need_no_forward_of_their_own(model, batches) -> None:
    """What stands before the questions is as it was harvested: gradients and logits are those of a whole forward."""
    batch = batches["all"]
    layers = harvest(model, batch.inputs, TILE)
    worse = [replace(layer, values=0.8 * layer.values) for layer in layers]
    found, wanted = (felt_by(model, batch, [5, 6, 7], worse, whole) for whole in (False, True))
    for own, other in zip(found, wanted, strict=True):
        for gradient, expected in zip(own, other, strict=True):
            assert bool(expected.any())
            torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_gradients_that_are_no_numbers_are_named() -> None:
    sink = GradientSink([range(2), range(2, 3)], [0, 3, 5], lambda number, layers: None)
    fine = rand(1, 1, 2, 2)
    sink.take(1, fine, fine)
    with pytest.raises(ValueError, match="layer 5: gradients of its keys or values are NaN"):
        sink.take(2, torch.full_like(fine, float("nan")), fine)


def test_a_groups_gradients_are_handed_on_when_all_are_there() -> None:
    done: list[tuple[int, list[float]]] = []
    sink = GradientSink(
        [range(2), range(2, 3)], range(3), lambda number, layers: done.append((number, [float(x.keys) for x in layers]))
    )
    for layer in (2, 1, 0):
        sink.take(layer, torch.tensor(float(layer)), torch.tensor(0.0))
    assert done == [(1, [2.0]), (0, [0.0, 1.0])]


def test_nothing_is_left_of_them_on_the_model(model, batches) -> None:
    felt_by(model, batches["last"], [0])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_second_moments_add_up_over_tiles_and_tokens() -> None:
    own, g = FisherSums(2, 5), rand(3, 2, 4, 5)
    own.add(g[:1])
    own.add(g[1:])
    torch.testing.assert_close(own.total, torch.einsum("estw,estv->swv", g, g))


def test_the_mixture_weighs_both_metrics_by_what_losing_everything_costs() -> None:
    moments, felt = [], []
    for width in (3, 6):
        own = Moments(2, 4, width)
        own.add(rand(20, 2, 4, width, seed=width) * torch.arange(1.0, width + 1))
        feel = FisherSums(2, width)
        feel.add(1e-4 * rand(7, 2, 4, width, seed=9 + width))
        moments.append(own)
        felt.append(feel)
    usual = [torch.eye(width, dtype=torch.float64).expand(2, width, width) for width in (3, 6)]
    mixture = Mixture((f.total, u, m.spread()) for f, u, m in zip(felt, usual, moments, strict=True))
    found = [mixture.metric(f.total, u) for f, u in zip(felt, usual, strict=True)]

    def cost(metrics: list[torch.Tensor]) -> float:
        return sum(float((m * own.spread()).sum()) for m, own in zip(metrics, moments, strict=True))

    share = [m - MIX * u for m, u in zip(found, usual, strict=True)]
    assert cost(share) == pytest.approx(cost(usual)), "as large as the usual one in all"
    ratio = [s / f.total for s, f in zip(share, felt, strict=True)]
    torch.testing.assert_close(ratio[0].mean(), ratio[1].mean(), msg="one factor for all sources")


def test_logits_that_feel_nothing_are_refused() -> None:
    own = Moments(1, 4, 3)
    own.add(rand(5, 1, 4, 3))
    with pytest.raises(ValueError, match="do not depend on the visual tokens"):
        Mixture([(FisherSums(1, 3).total, torch.eye(3, dtype=torch.float64)[None], own.spread())])


def test_gradients_turn_the_other_way_than_what_they_are_of() -> None:
    """In a layer group's coordinates, too, a step along x adds g . x to what is felt."""
    generator = torch.Generator().manual_seed(3)
    into = torch.randn(4, 1, 2, 2, generator=generator)
    own = Coordinates(into, torch.linalg.inv(into).transpose(2, 3))
    fit = SimpleNamespace(coordinates=[own], heads=1)

    def layers(seed: int) -> list[LayerTiles]:
        return [LayerTiles(rand(3, 1, 4, 2, seed=seed + i), rand(3, 1, 4, 2, seed=seed + 10 + i)) for i in range(2)]

    step, slope = layers(0), layers(50)
    ((_, x),) = CrossLayerFit.sources(fit, 0, step)
    ((_, g),) = CrossLayerFit.sources(fit, 0, slope, gradients=True)
    felt = sum((a * b).sum() for one, two in zip(step, slope, strict=True) for a, b in zip(one, two, strict=True))
    torch.testing.assert_close((x.double() * g.double()).sum(), felt.double(), atol=1e-5, rtol=1e-5)

"""What training holds at a time: one layer group of a batch, and statistics no larger than counted beforehand."""

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from support.training_cost import SHAPES, build

from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.eval.bench.peak_memory import LiveBytes
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.training import harvesting_fit, streamed
from kvcapsule.training.datamodule import Questions
from kvcapsule.training.families.coefficient_fit import CoefficientFit
from kvcapsule.training.families.cross_layer import CrossLayerFit
from kvcapsule.training.families.cross_layer_options import CrossLayerRecipe
from kvcapsule.training.families.transform import TransformFit
from kvcapsule.training.families.transform_options import TransformRecipe
from kvcapsule.training.fisher import GradientSink, each_gradient
from kvcapsule.training.harvest import LayerHarvest
from kvcapsule.training.losses import full_output, output_error
from kvcapsule.training.question_forward import Surroundings
from kvcapsule.training.stage_lines import LONG, with_lines
from kvcapsule.training.task import Task
from kvcapsule.training_footprint import FISHER, HARVEST, PROBE
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

TILE, BATCH, BATCHES = 49, 2, 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("random")
    build(SHAPES["small"], folder)
    return load_vlm(str(folder), None, "float32", "cpu")


def fit_of(loaded: Any, family: type[CoefficientFit[Any]]) -> CoefficientFit[Any]:
    model, processor = loaded
    rows = source.load(SourceConfig(source="pages", split="train", size=16))
    recipe_class = CrossLayerRecipe if family is CrossLayerFit else TransformRecipe
    options = replace(recipe_class().transform, logit_batches=2)
    recipe = recipe_class(batch=BATCH, compression=20.0, moment_batches=BATCHES, device="cpu", transform=options)
    geometry = KVGeometry.from_config(model.config)
    data = Questions(rows, rows, processor, batch=BATCH)
    return family(Task(recipe, model, data, geometry, TILE, 196, Console(quiet=True)))


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where a batch's harvest is too large for any memory: no harvests and hardly any tiles."""
    monkeypatch.setattr(harvesting_fit, "SAMPLE_BYTES", 2**19)
    yield


def harvest_bytes(layer: LayerHarvest) -> int:
    return storage_bytes(iter((layer.keys, layer.values)))


@pytest.mark.parametrize("family", [CrossLayerFit, TransformFit])
def test_one_layer_group_of_a_batch_is_alive_at_a_time(
    loaded: Any, family: Any, nothing_held: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values that the recorder made, counted while others are made: at most those of a group, and of the
    layer that comes next."""
    fit, alive, most = fit_of(loaded, family), weakref.WeakSet[torch.Tensor](), [0]
    # What is there already need not be looked through again and again.
    gc.freeze()
    record = streamed.GroupRecorder.compress

    def counted(self: Any, prefill: Any) -> Any:
        gc.collect()
        most[0] = max(most[0], len(alive))
        before = self.visit

        def visit(number: int, layers: list[LayerHarvest]) -> None:
            alive.update(x for layer in layers for x in (layer.keys, layer.values))
            before(number, layers)

        self.visit = visit
        try:
            return record(self, prefill)
        finally:
            self.visit = before

    monkeypatch.setattr(streamed.GroupRecorder, "compress", counted)
    fit.prepare()
    gc.unfreeze()
    assert len(fit.layers) == len(fit.groups)
    # What the last group left is let go before the next one begins.
    assert most[0] <= 2 * len(fit.groups[0])


@pytest.mark.parametrize("family", [CrossLayerFit, TransformFit])
def test_the_peak_is_what_is_counted_beforehand(loaded: Any, family: Any, nothing_held: None) -> None:
    """Of all tensors that live, less what a forward of a batch takes by itself."""
    fit = fit_of(loaded, family)
    model = fit.task.model
    batch = next(iter(fit.task.data.first_epoch()))
    with LiveBytes() as forward, torch.no_grad():
        model(**batch.inputs)
    with LiveBytes() as training:
        fit.prepare()
    counted = max(stage.bytes for stage in fit.size().stages())
    measured = training.peak - forward.peak
    assert 0.2 * counted < measured < 2 * counted, f"{measured:,} of {counted:,} bytes"
    assert set(fit.held()) >= {HARVEST, PROBE, FISHER}


def test_a_sample_of_tiles_gives_nearly_the_code_of_all(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fit_of(loaded, TransformFit)
    kept.prepare()
    monkeypatch.setattr(harvesting_fit, "SAMPLE_BYTES", 2**21)
    monkeypatch.setattr("kvcapsule.training.harvest_source.LEAST_TILES", 8)
    part = fit_of(loaded, TransformFit)
    part.prepare()
    sample = part.harvests._sample
    assert sample is not None and not sample.complete and 8 < sample.expected < 30
    batch = next(iter(kept.task.data.val_dataloader()))
    errors = [[], []]
    for of_fit, own in zip(errors, (kept, part), strict=True):

        def visit(number: int, layers: list[LayerHarvest], of_fit: Any = of_fit, own: Any = own) -> None:
            for layer, segment in zip(layers, own.stored(number, layers), strict=True):
                of_fit.append(float(output_error(layer, segment, full_output(layer))))

        own.stream(batch, visit)
    assert sum(errors[1]) == pytest.approx(sum(errors[0]), rel=0.25)


def test_too_few_tiles_are_read_anew(loaded: Any, nothing_held: None) -> None:
    fit, again = fit_of(loaded, TransformFit), fit_of(loaded, TransformFit)
    fit.prepare()
    assert fit.harvests.sampled() is None
    numbers: list[int] = []
    fit.each_tiles("again", lambda number, layers: numbers.append(number))
    assert numbers == [0, 1, 2, 3] * BATCHES
    again.prepare()
    for one, other in zip(fit.layers.state_dict().values(), again.layers.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_long_stage_is_announced_once_a_batch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 40.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    lines: list[str] = []
    assert list(with_lines("abc", "moments", 3, 2_500_000_000, lines.append)) == ["a", "b", "c"]
    assert lines == [
        "moments: 3 batches of 40.0 s, about 2.0 min in all, holding up to 2.5 GB beside the model and a batch."
    ]
    clock = iter([0.0, LONG / 3 - 0.1])
    assert list(with_lines("abc", "moments", 3, None, lines.append)) == ["a", "b", "c"] and len(lines) == 1


def test_files_of_harvests_serve_all_tiles(loaded: Any, tmp_path: Path, nothing_held: None) -> None:
    fit = fit_of(loaded, TransformFit)
    whole = fit_of(loaded, TransformFit)
    object.__setattr__(fit.task.recipe, "harvests", str(tmp_path))
    fit.prepare()
    assert len(list(tmp_path.iterdir())) == BATCHES
    whole.prepare()
    for one, other in zip(fit.layers.state_dict().values(), whole.layers.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_leaves_nothing_behind(loaded: Any, nothing_held: None) -> None:
    """Without a look for cycles of references: neither what was harvested, nor what the questions read."""
    fit = fit_of(loaded, TransformFit)
    batch = next(iter(fit.task.data.first_epoch()))
    remembered: list[weakref.ref[torch.Tensor]] = []
    gc.collect()
    gc.disable()
    try:
        around: list[Surroundings] = []
        tiles: list[Segment] = []

        def visit(number: int, layers: list[LayerHarvest], around: Any = around, tiles: Any = tiles) -> None:
            for layer in layers:
                around.append(Surroundings.of(layer))
                tiles.append(Segment(layer.keys, layer.values, layer.owner, frame=layer.frame))
                remembered.extend(map(weakref.ref, (layer.keys, layer.values, layer.rest.keys, layer.query)))

        fit.stream(batch, visit)
        indices = fit.task.geometry.capsule_layers
        sink = GradientSink(fit.groups, indices, lambda number, layers: remembered.append(weakref.ref(layers[0].keys)))
        each_gradient(fit.harvests.forward_of(batch, around), tiles, batch.answers, [0] * BATCH, sink.take)
        assert len(remembered) == 5 * 4 and any(of() is not None for of in remembered)
        around.clear()
        tiles.clear()
        assert all(of() is None for of in remembered)
    finally:
        gc.enable()

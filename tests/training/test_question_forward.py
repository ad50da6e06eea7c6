"""Question forward: the tokens behind the images alone, in every family of models that it covers."""

from dataclasses import replace

import pytest
import torch
from support import tiny_vlm
from support.family_models import CASES, TILE, built

from kvcapsule.segments.segment import Segment
from kvcapsule.training.frozen_forward import logits_reading
from kvcapsule.training.harvest import LayerHarvest, Recorder, harvest_with_logits
from kvcapsule.training.question_forward import SegmentReading, Surroundings, covers, question_logits

NAMES = [f"{case.family.name}:{case.model_type}" for case in CASES]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("index", range(len(CASES)), ids=NAMES)
@torch.no_grad()
def test_logits_are_those_of_a_forward_of_all_tokens(index: int) -> None:
    """Behind images that are read as they are, and behind ones whose values are halved."""
    one = built(index)
    if not covers(one.model):
        pytest.skip("its images attend to the question, or some layers hold a state of all tokens")
    inputs = tiny_vlm.batch(one.tiny, *one.prompts)
    layers, logits = harvest_with_logits(one.model, inputs, TILE, True, inputs["input_ids"].shape[1])
    reads = layers[0].reads
    last = reads.shape[1]
    assert bool(reads.any(1).all())

    def tiles(factor: float) -> list[SegmentReading]:
        return [SegmentReading(Segment(x.keys, factor * x.values, x.owner, frame=x.frame)) for x in layers]

    def behind(factor: float) -> torch.Tensor:
        around = [Surroundings.of(layer) for layer in layers]
        return question_logits(one.model, inputs, tiles(factor), around, last)[reads]

    torch.testing.assert_close(behind(1.0), logits[:, -last:][reads], atol=2e-4, rtol=1e-4)
    whole = logits_reading(one.model, inputs, Recorder(TILE), tiles(0.5), last)[reads]
    assert (whole - logits[:, -last:][reads]).abs().amax() > 1e-2
    torch.testing.assert_close(behind(0.5), whole, atol=2e-4, rtol=1e-4)


def test_what_is_not_covered_is_known() -> None:
    """Of all families, so that a skip above hides nothing."""
    left_out = {CASES[i].model_type for i in range(len(CASES)) if not covers(built(i).model)}
    hybrids = {"aya_vision", "cohere2_vision", "gemma3", "gemma4", "lfm2_vl", "qwen3_5", "qwen3_5_moe"}
    assert left_out == {"paligemma", *hybrids}


def test_a_harvest_without_places_is_refused() -> None:
    one = built(0)
    inputs = tiny_vlm.batch(one.tiny, *one.prompts)
    layer: LayerHarvest = harvest_with_logits(one.model, inputs, TILE, True, 1)[0][0]
    with pytest.raises(ValueError, match="does not say where"):
        Surroundings.of(replace(layer, place=None))

"""Frozen forward: a forward of the frozen VLM in which tokens after the images read the codecs' segments, with
gradients to the codecs."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import BatchFeature, PreTrainedModel

from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.segments.segment import Segment

from .harvest import AT_SPANS, Alignment, Recorder
from .processes import ratio
from .question_forward import Reading, SegmentReading


class _ReadingLayer(CapsuleLayer):
    """Cache layer in which tokens after the last image read tiles as a reading says, and all others the full keys and
    values."""

    def __init__(self, index: int, recorder: Recorder, reading: Reading) -> None:
        super().__init__(index, recorder)
        self.recorder, self.reading = recorder, reading

    @property
    def is_empty(self) -> bool:
        return False

    def attend(self, query: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
        prefill = self.take_prefill(query, scale)
        self.recorder.compress(prefill)
        layer = self.recorder.layers.pop()
        group = query.shape[1] // prefill.keys.shape[1]
        keys, values = (x.repeat_interleave(group, dim=1) for x in (prefill.keys, prefill.values))
        exact = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, is_causal=mask is None)
        first = query.shape[2] - layer.query.shape[2]
        read = self.reading.read(layer.query, layer.rest, layer.visible, scale)
        return torch.cat(
            [exact[:, :, :first], torch.where(layer.reads[:, None, :, None], read, exact[:, :, first:])], dim=2
        )


def logits_through(
    model: PreTrainedModel,
    inputs: BatchFeature,
    tile: int,
    canonical: bool,
    segments: Sequence[Segment],
    last: int,
    alignment: Alignment = AT_SPANS,
) -> torch.Tensor:
    """Logits [B, last, vocabulary] of the last tokens of teacher-forced inputs that read `segments`, the tiles of each
    layer with full attention."""
    readings = [SegmentReading(segment) for segment in segments]
    return logits_reading(model, inputs, Recorder(tile, canonical, alignment), readings, last)


def logits_reading(
    model: PreTrainedModel, inputs: BatchFeature, like: Recorder, readings: Sequence[Reading], last: int
) -> torch.Tensor:
    """The same of inputs that read as each layer's reading says; like: cuts tiles as they were cut in the harvest."""
    with attach(model):
        cache = CapsuleCache(model.config, like)
        for layer, reading in zip(cache.capsule_layers(), readings, strict=True):
            recorder = Recorder(like.tile, like.canonical, like.alignment)
            cache.layers[layer.index] = _ReadingLayer(layer.index, recorder, reading)
        logits: torch.Tensor = model(**inputs.to(model.device), **cache_argument(cache), logits_to_keep=last).logits
    return logits


def answer_mask(answers: torch.Tensor, last: int) -> torch.Tensor:
    """Mask [B, last] of the last logits that predict a token of the answer; answers [B] as in `divergence`."""
    positions = torch.arange(last, device=answers.device)
    return (positions >= last - 1 - answers[:, None]) & (positions < last - 1)


def divergence(true: torch.Tensor, through: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Mean KL(true || through) in nats over the predictions of answer tokens of all processes.

    Args:
        true, through: logits [B, last, vocabulary] of the last tokens.
        answers: [B], number of answer tokens at the end of each row; a token is predicted one position before it.
    """
    predict = answer_mask(answers, true.shape[1])
    log_true, log_through = true[predict].float().log_softmax(-1), through[predict].float().log_softmax(-1)
    of_tokens = (log_true.exp() * (log_true - log_through)).sum(-1)
    return ratio(of_tokens.sum(), predict.sum())

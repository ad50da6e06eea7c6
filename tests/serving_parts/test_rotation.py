"""The rotary embedding made from a config is the model's own."""

import pytest
import torch
from support.family_models import CASES, Case
from support.tiny_vlm import build
from transformers import LlavaForConditionalGeneration

from kvcapsule.errors import ModelError
from kvcapsule.inference.transformers_api import rotation_per_token
from kvcapsule.serving.rotation import RotaryEmbedding


def test_that_of_llava(model: LlavaForConditionalGeneration) -> None:
    embedding = RotaryEmbedding(model.config)
    assert embedding.axes == 1
    positions = torch.tensor([[0, 1, 7, 300]])
    expected = model.get_decoder().rotary_emb(torch.zeros(1), positions)
    for ours, own in zip(embedding.at(positions), expected, strict=True):
        assert torch.equal(ours, own)
    for ours, own in zip(embedding.first(4), embedding.at(torch.arange(4)[None]), strict=True):
        assert torch.equal(ours, own)


@pytest.mark.parametrize("case", [case for case in CASES if "Qwen" in case.family.name], ids=lambda c: c.model_type)
def test_positions_of_three_axes(case: Case) -> None:
    model = build(case.model_type, case.builder())
    embedding = RotaryEmbedding(model.config)
    assert embedding.axes == 3
    positions = torch.tensor([[[0, 1, 5, 5]], [[0, 1, 6, 9]], [[0, 1, 7, 2]]])
    rotary = next(m for name, m in model.get_decoder().named_modules() if name.rpartition(".")[2] == "rotary_emb")
    expected = rotation_per_token(rotary, *rotary(torch.zeros(1), positions))
    for ours, own in zip(embedding.at(positions), expected, strict=True):
        assert ours.shape[:2] == (1, 4) and torch.equal(ours, own)


def test_a_model_without_one_is_refused(model: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "named_modules", lambda self: iter(()))
    with pytest.raises(ModelError, match="no rotary embedding"):
        RotaryEmbedding(model.config)

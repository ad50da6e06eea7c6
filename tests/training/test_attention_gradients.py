"""What the logits feel of an error in attention's output: gradients by finite differences, at no other place."""

import pytest
import torch

from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import ConfigError
from kvcapsule.training.attention_gradients import sensitivities
from kvcapsule.training.datamodule import Batch, Questions
from kvcapsule.training.fisher import sampled_log_likelihood
from kvcapsule.training.harvest import harvest
from kvcapsule.vlm.loading import load_vlm

TILE = 28


@pytest.fixture(scope="module")
def vlm() -> tuple[torch.nn.Module, Batch]:
    model, processor = load_vlm("pages-vlm", None, "float32", "cpu")
    rows = source.load(SourceConfig(source="pages", split="validation", size=2))
    return model, next(iter(Questions(rows, rows, processor, batch=2).val_dataloader()))


def test_costs_are_half_the_mean_squared_gradient(vlm: tuple[torch.nn.Module, Batch]) -> None:
    """An error along one head's output, put there by a hook on the output projection: log p moves by the gradient, whose
    square over all channels is what the cost tells."""
    model, batch = vlm
    seeds, last = [3, 4], int(batch.answers.max()) + 1
    found = sensitivities(model, batch, TILE, True, seeds)
    layers = harvest(model, batch.inputs, TILE)
    assert len(found) == len(layers)
    for (layer, cost), other in zip(found, layers, strict=True):
        assert torch.equal(layer.keys, other.keys) and torch.equal(layer.query, other.query)
        assert cost.shape == layer.query.shape[:3] and not layer.keys.requires_grad
        assert float(cost.masked_fill(layer.reads[:, None], 0.0).abs().max()) == 0 or bool((cost >= 0).all())
    index, row, head = 1, 0, 2
    dim = layers[0].query.shape[3]
    query = int(found[index].cost[row, head].argmax())
    projection = next(
        module for name, module in model.named_modules() if name.endswith(f"layers.{index}.self_attn.o_proj")
    )
    moved = []
    with torch.no_grad():
        for channel in range(dim):
            ends = []
            for sign in (1, -1):

                def push(_: object, inputs: tuple[torch.Tensor], sign: int = sign, channel: int = channel):
                    x = inputs[0].clone()
                    x[row, query - found[index].cost.shape[2], head * dim + channel] += sign * 0.02
                    return (x,)

                handle = projection.register_forward_pre_hook(push)
                logits = model(**batch.inputs, logits_to_keep=last).logits
                handle.remove()
                ends.append(sampled(logits, batch, seeds, model))
            moved.append((ends[0] - ends[1]) / 0.04)
    assert float(torch.tensor(moved).square().mean()) / 2 == pytest.approx(
        float(found[index].cost[row, head, query]), rel=0.05
    )


def sampled(logits: torch.Tensor, batch: Batch, seeds: list[int], model: torch.nn.Module) -> float:
    """Log p of the tokens that are drawn from the true logits."""
    last = logits.shape[1]
    true = model(**batch.inputs, logits_to_keep=last).logits
    from kvcapsule.training.frozen_forward import answer_mask

    mask = answer_mask(batch.answers, last)
    drawn = [torch.rand(int(n), generator=torch.Generator().manual_seed(s)) for n, s in zip(batch.answers, seeds, strict=True)]
    chosen = torch.searchsorted(true[mask].float().softmax(-1).cumsum(-1), torch.cat(drawn)[:, None])
    return float(logits[mask].double().log_softmax(-1).gather(1, chosen).sum())


def test_logits_that_depend_on_nothing_are_refused(vlm: tuple[torch.nn.Module, Batch], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvcapsule.training.attention_gradients.sampled_log_likelihood",
        lambda *given: 0 * sampled_log_likelihood(*given),
    )
    model, batch = vlm
    with pytest.raises(ConfigError, match="do not depend on attention"):
        sensitivities(model, batch, TILE, True, [1, 2])

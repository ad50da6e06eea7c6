"""What the logits feel of an error in attention's output, against finite differences."""

import pytest
import torch
from transformers import PreTrainedModel

from kvcapsule.data import source
from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import ConfigError
from kvcapsule.training.attention_gradients import sensitivities
from kvcapsule.training.datamodule import Batch, Questions
from kvcapsule.training.fisher import sampled_log_likelihood
from kvcapsule.training.frozen_forward import answer_mask
from kvcapsule.training.harvest import harvest
from kvcapsule.vlm.loading import load_vlm

TILE, SEEDS = 28, [3, 4]

Vlm = tuple[PreTrainedModel, Batch]


@pytest.fixture(scope="module")
def vlm() -> Vlm:
    model, processor = load_vlm("pages-vlm", None, "float32", "cpu")
    rows = source.load(SourceConfig(source="pages", split="validation", size=2))
    return model, next(iter(Questions(rows, rows, processor, batch=2).val_dataloader()))


def test_the_harvest_is_the_usual_one(vlm: Vlm) -> None:
    model, batch = vlm
    for (layer, cost), usual in zip(
        sensitivities(model, batch, TILE, True, SEEDS), harvest(model, batch.inputs, TILE), strict=True
    ):
        torch.testing.assert_close(layer.keys, usual.keys)
        torch.testing.assert_close(layer.query, usual.query)
        assert cost.shape == layer.query.shape[:3] and not layer.keys.requires_grad


def test_costs_are_half_the_mean_squared_slope_of_the_drawn_tokens_log_probability(vlm: Vlm) -> None:
    """An error is put into one channel after the other of a head's output, at the query that costs most."""
    model, batch = vlm
    index, row, head, step = 1, 0, 2, 0.02
    cost = sensitivities(model, batch, TILE, True, SEEDS)[index].cost
    last, dim = int(batch.answers.max()) + 1, harvest(model, batch.inputs, TILE)[0].query.shape[3]
    query = int(cost[row, head].argmax())
    names = dict(model.named_modules())
    (projection,) = (m for name, m in names.items() if name.endswith(f"layers.{index}.self_attn.o_proj"))

    @torch.no_grad()
    def log_p(channel: int = 0, moved: float = 0.0) -> torch.Tensor:
        def push(_: object, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            (x,) = (x.clone() for x in inputs)
            x[row, query - cost.shape[2], head * dim + channel] += moved
            return (x,)

        handle = projection.register_forward_pre_hook(push)
        logits = model(**batch.inputs, logits_to_keep=last).logits
        handle.remove()
        return logits[answer_mask(batch.answers, last)].double().log_softmax(-1)

    drawn = torch.cat(
        [
            torch.rand(int(n), generator=torch.Generator().manual_seed(s))
            for n, s in zip(batch.answers, SEEDS, strict=True)
        ]
    )
    tokens = torch.searchsorted(log_p().exp().cumsum(-1), drawn.double()[:, None])
    slopes = [float((log_p(c, step) - log_p(c, -step)).gather(1, tokens).sum()) / (2 * step) for c in range(dim)]
    assert sum(slope**2 for slope in slopes) / dim / 2 == pytest.approx(float(cost[row, head, query]), rel=0.05)


def test_logits_that_depend_on_nothing_are_refused(vlm: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    def constant(*given: object) -> torch.Tensor:
        return 0 * sampled_log_likelihood(*given)  # type: ignore[arg-type]

    monkeypatch.setattr("kvcapsule.training.attention_gradients.sampled_log_likelihood", constant)
    with pytest.raises(ConfigError, match="do not depend on attention"):
        sensitivities(*vlm, TILE, True, SEEDS)

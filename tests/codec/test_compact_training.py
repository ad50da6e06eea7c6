"""Training of compact capsules: the query bank and the selector."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.builders import DIM, HEADS, TILE, prefill, rand
from support.compact_layers import LONG, layer, low_rank, selected

from kvcapsule import attach
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.compact import CompactConfig
from kvcapsule.segments.segment import Segment
from kvcapsule.training.families.token_selector import chosen_by_teacher, imitation_loss, initialise
from kvcapsule.training.harvest import LayerHarvest, Recorder
from kvcapsule.training.losses import full_output, output_error
from kvcapsule.training.main import main as train
from kvcapsule.training.query_bank import QueryBank
from kvcapsule.vlm.geometry import KVGeometry


@pytest.fixture
def harvested() -> LayerHarvest:
    """Two rows of a small prefill: three tiles, and the tokens behind the last image as queries."""
    recorder = Recorder(TILE)
    recorder.compress(prefill())
    return recorder.layers[0]


def test_the_bank_holds_queries_that_read_in_the_tiles_frames(harvested: LayerHarvest) -> None:
    """Row 0 has 3 queries behind its image and 2 tiles, row 1 has 15 and 1; two query heads share a KV head."""
    bank = QueryBank(2 * (2 * 3 + 15))
    bank.add(harvested)
    assert bank.seen == 42
    found = bank.bank()
    assert found.shape == (HEADS, 42, DIM)
    offered = []
    for tile, row in enumerate(harvested.owner.tolist()):
        query = harvested.query[row][:, harvested.reads[row]].float()
        offered.append(harvested.frame.select(torch.tensor([tile])).unrotate(query[None])[0].view(HEADS, -1, DIM))
    for head in range(HEADS):
        one, other = found[head].double(), torch.cat(offered, dim=1)[head].double()
        distance = (one[:, None] - other).norm(dim=-1)
        assert float(distance.amin(0).max()) < 1e-6
        assert float(distance.amin(1).max()) < 1e-6


def test_the_bank_prefers_queries_that_look_at_the_tile() -> None:
    """Of a hundred queries the first ten give the tile nearly all their attention, the others a hundredth."""
    keys = torch.zeros(1, 1, 4, 2)
    keys[..., 0] = 1.0
    query = torch.zeros(1, 1, 100, 2)
    query[:, :, :, 0] = -6.0
    query[:, :, :10, 0] = 6.0
    rest = Segment(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), torch.tensor([0]))
    reads, visible = torch.ones(1, 100, dtype=torch.bool), torch.ones(1, 100, 4, dtype=torch.bool)
    bank = QueryBank(8)
    bank.add(LayerHarvest(keys, keys, torch.tensor([0]), None, query, reads, rest, visible, 0.75))
    assert (bank.bank()[0, :, 0] > 0).sum() == 8


def test_banks_are_seeded_and_merge(harvested: LayerHarvest) -> None:
    banks = [QueryBank(20, seed) for seed in (0, 0, 1)]
    for bank in banks:
        bank.add(harvested)
    assert torch.equal(banks[0].bank(), banks[1].bank())
    assert not torch.equal(banks[0].bank(), banks[2].bank())
    both = torch.cat([banks[0].priority, banks[2].priority], dim=1).sort(descending=True).values[:, :20]
    banks[0].merge(banks[2].queries, banks[2].priority)
    assert torch.equal(banks[0].priority, both)


def test_a_bank_that_cannot_be_filled_is_refused(harvested: LayerHarvest) -> None:
    bank = QueryBank(50)
    with pytest.raises(ValueError, match="bank of 50 queries cannot be filled from the 0"):
        bank.bank()
    bank.add(harvested)
    with pytest.raises(ValueError, match="bank of 50 queries cannot be filled from the 42"):
        bank.bank()


def test_a_bank_of_the_readers_serves_them(harvested: LayerHarvest) -> None:
    """Under the queries that filled the bank, half the tokens read nearly as all do."""
    bank = QueryBank(42)
    bank.add(harvested)
    codec = layer(0.5, bank=42).float()
    codec.bank.copy_(bank.bank())
    encoded = codec.encode(harvested.keys.float(), harvested.values.float())
    of = replace(harvested, keys=harvested.keys.float(), values=harvested.values.float(), query=harvested.query.float())
    kept = codec.choose(codec.bank_attention(of.keys), of.keys, of.values).kept
    errors = [
        output_error(of, e.segment(of.owner, of.frame), full_output(of))
        for e in (encoded, selected(of.keys, of.values, kept))
    ]
    assert errors[0] < 0.3 * errors[1]


def test_a_selector_learns_its_teachers_choice() -> None:
    """Every other token has a short key here, so that some of the choice can be learned from few tiles."""
    keys, values, _ = low_rank(48, noise=0.3)
    keys[:, :, ::2] *= 0.05
    codec = layer(0.25, tile=LONG, selector="learned", passes=0).float()
    chosen = chosen_by_teacher(codec, keys.float(), values.float())
    assert (chosen.sum(-1) == codec.stored).all()
    assert codec.selector is not None
    initialise(codec.selector, keys, values)

    def agreement() -> float:
        own = codec.choose(codec.bank_attention(keys.float()), keys.float(), values.float()).kept
        return float(chosen.gather(-1, own).float().mean())

    before = agreement()
    optimizer = torch.optim.Adam(codec.selector.requires_grad_(True).parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = imitation_loss(codec.selector, keys.float(), values.float(), chosen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.75 * losses[0]
    assert agreement() > before + 0.2


@pytest.mark.parametrize("selector", ["attention", "learned"])
def test_the_command_trains_a_compact_capsule(selector: str, tmp_path: Path) -> None:
    quick = [
        "--data.size",
        "48",
        "--held_out",
        "16",
        "--batch",
        "8",
        "--moment_batches",
        "2",
        "--codec.tile",
        "28",
        "--threads",
        "1",
    ]
    output = tmp_path / "compact"
    wanted = ["--compact.selector", selector, "--compact.steps", "3", "--compact.bank", "64", "--compression", "5"]
    assert train(["compact", *quick, *wanted, "--output", str(output)]) == 0
    capsule = Capsule.from_pretrained(output)
    assert isinstance(capsule.config.codec, CompactConfig)
    assert capsule.config.codec.ratios == (0.2,) * 4
    assert json.loads((output / "metrics.json").read_text())["train"]["output_error"] < 0.2


def test_prefills_of_generate(
    model: Any, make_batch: Callable[..., Any], greedy: dict[str, Any], geometry: KVGeometry
) -> None:
    """At ratio 1 the model answers as with its full cache."""
    config = CompactConfig(49, ratios=(1.0,) * geometry.layers, bank=64)
    built = Capsule(CapsuleConfig("compact", config, geometry, "tiny"))
    for seed, codec in enumerate(built.layers):
        codec.bank.copy_(rand(*codec.bank.shape, seed=seed))
    batch = make_batch((1, "Read line 2."), (2, "What is the number beside the owl?"))
    expected = model.generate(**batch, **greedy)
    with attach(model, built):
        found = model.generate(**batch, **greedy)
    assert torch.equal(found.sequences, expected.sequences)

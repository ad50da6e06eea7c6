"""Training of tiles that begin at blocks: phases are drawn once for each question, and all that cuts tiles cuts the
same ones."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BatchFeature, DynamicCache

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data import source
from kvcapsule.data.prompts import conversation, encode
from kvcapsule.data.source import SourceConfig
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.segments.segment import Segment
from kvcapsule.testbeds import pages
from kvcapsule.training.datamodule import Batch, Questions
from kvcapsule.training.fisher import GradientSink, each_gradient
from kvcapsule.training.frozen_forward import logits_reading, logits_through
from kvcapsule.training.harvest import AT_SPANS, Alignment, LayerHarvest, Recorder, harvest, harvest_with_logits
from kvcapsule.training.harvest_store import HarvestStore
from kvcapsule.training.losses import full_output
from kvcapsule.training.main import main

TILE, IMAGE = 64, 196
AT_BLOCKS = Alignment(32, (0, 5, 31))
FIRST = (31, 26, 0)
"""Tokens of the image before the first block, which begins at position 1 of its row."""


@pytest.fixture(scope="module")
def batch(processor) -> BatchFeature:
    """Three questions of unlike length."""
    return encode(processor, [conversation([r["image"]], r["prompt"], r["answer"]) for r in pages.pages("train", 3)])


def exact(layers: list[LayerHarvest]) -> list[Segment]:
    return [Segment(layer.keys, layer.values, layer.owner, frame=layer.frame) for layer in layers]


def test_tiles_are_cut_at_the_phase_of_their_row(model, batch) -> None:
    cache = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(**batch, **cache_argument(cache))
    layers = harvest(model, batch, TILE, alignment=AT_BLOCKS)
    counts = [(IMAGE - first) // TILE for first in FIRST]
    assert counts == [2, 2, 3] and layers[0].owner.tolist() == [0, 0, 1, 1, 2, 2, 2]
    for layer, own in zip(layers, cache.layers, strict=True):
        keys = layer.frame.rotate(layer.keys)
        for row, (first, count) in enumerate(zip(FIRST, counts, strict=True)):
            start = int((batch["input_ids"][row] == model.config.image_token_id).nonzero()[0]) + first
            mine, there = layer.owner == row, slice(start, start + count * TILE)
            for tiles, whole in ((keys, own.keys), (layer.values, own.values)):
                torch.testing.assert_close(
                    tiles[mine].transpose(0, 1).flatten(1, 2), whole[row, :, there], atol=1e-5, rtol=1e-5
                )
        stored = layer.rest.mask.sum(1) + torch.tensor(counts) * TILE
        assert torch.equal(stored, batch["attention_mask"].sum(1))


def test_queries_read_what_the_model_reads(model, batch) -> None:
    """Tiles and rest together are the whole prompt, in the harvest and in the forward through it."""
    layers, logits = harvest_with_logits(model, batch, TILE, True, 3, AT_BLOCKS)
    for at_blocks, at_span in zip(layers, harvest(model, batch, IMAGE), strict=True):
        read = at_blocks.reads
        ours, theirs = (full_output(layer).transpose(1, 2)[read] for layer in (at_blocks, at_span))
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    through = logits_through(model, batch, TILE, True, exact(layers), 3, AT_BLOCKS)
    torch.testing.assert_close(through, logits, atol=1e-4, rtol=1e-4)
    other = logits_through(model, batch, TILE, True, exact(layers), 3, AT_SPANS)
    assert not torch.allclose(other, logits, atol=1e-2), "tiles of other tokens than the segments' go unnoticed"


def test_gradients_are_taken_at_the_same_tiles(model, batch) -> None:
    layers = harvest(model, batch, TILE, alignment=AT_BLOCKS)
    found, like = {}, Recorder(TILE, True, AT_BLOCKS)
    sink = GradientSink([range(len(layers))], range(len(layers)), lambda number, own: found.update({number: own}))
    answers, seeds = torch.tensor([2, 2, 2]), [0, 1, 2]
    each_gradient(lambda *read: logits_reading(model, batch, like, *read), exact(layers), answers, seeds, sink.take)
    slopes = found[0]
    assert [slope.keys.shape for slope in slopes] == [layer.keys.shape for layer in layers]
    assert all(bool((slope.values.flatten(1).abs().sum(1) > 0).all()) for slope in slopes[:-1])


def test_a_question_has_the_same_phase_in_every_pass() -> None:
    """It is drawn by the question's number: in another batch, another epoch and a second loader it is the same."""
    rows = source.load(SourceConfig(source="pages", split="train", size=64))

    def phases(epoch: int, batch: int, seed: int = 0, align: int = 32) -> dict[int, int]:
        data = Questions(rows, rows, None, batch=batch, seed=seed).served(align)
        loader = data.first_epoch()
        steps = len(loader)
        loader.batch_sampler.run(epoch * steps, (epoch + 1) * steps)
        found: dict[int, int] = {}
        for numbers in loader.batch_sampler:
            found |= dict(zip(numbers, data._alignment(numbers).before, strict=True))
        return found

    first = phases(0, 8)
    assert first == phases(1, 8) == phases(0, 16) and first.keys() == set(range(64))
    assert set(first.values()) <= set(range(32)) and len(set(first.values())) > 20
    assert first != phases(0, 8, seed=1)
    assert Questions(rows, rows, None, batch=8)._alignment([0, 1]) == AT_SPANS


def test_harvests_of_other_phases_are_other_files(model, batch, tmp_path: Path) -> None:
    kept = HarvestStore(tmp_path, model, TILE, True)
    assert kept.path(batch) == kept.path(batch, AT_SPANS), "files of earlier versions are found"
    names = {kept.path(batch, of) for of in (AT_SPANS, AT_BLOCKS, Alignment(32, (1, 5, 31)), Alignment(16, (0, 5, 31)))}
    assert len(names) == 4
    own, *others = (kept.harvest(batch, AT_BLOCKS) for _ in range(2))
    for one, other in zip(own, others[0], strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=0)


def run(*words: str) -> int:
    quick = ["--data.size", "40", "--held_out", "8", "--batch", "4", "--moment_batches", "8", "--device", "cpu"]
    return main([*words, *quick])


QUICK = {
    "transform": ["--transform.logit_batches", "1", "--compression", "10"],
    "cross-layer": ["--transform.logit_batches", "1", "--compression", "10"],
    "kvcapsule-paper": ["--optim.soft_steps", "1", "--optim.hard_steps", "1"],
    "compact": ["--compact.bank", "16"],
}


@pytest.mark.parametrize("recipe", QUICK)
def test_capsules_of_all_families_keep_their_alignment(vlm, tmp_path: Path, recipe: str) -> None:
    output = tmp_path / "capsule"
    words = ["--codec.align", "16", "--codec.tile", "48", "--model", vlm, "--output", str(output)]
    assert run(recipe, *words, *QUICK[recipe]) == 0
    codec = Capsule.from_pretrained(output).config.codec
    assert (codec.tile, codec.align) == (48, 16)
    assert "align: 16" in (output / "recipe.yaml").read_text()


def test_a_whole_image_is_the_blocks_that_it_always_holds(vlm, tmp_path: Path, capsys) -> None:
    """Of 196 tokens, 15 or fewer stand before the first block of 16."""
    output = tmp_path / "capsule"
    assert run("compact", "--codec.align", "16", "--model", vlm, "--output", str(output), *QUICK["compact"]) == 0
    assert json.loads((output / "config.json").read_text())["codec"]["tile"] == 176
    assert run("compact", "--codec.align", "128", "--model", vlm, "--output", str(tmp_path / "none")) == 2
    assert "choose a --codec.align of at most 98" in " ".join(capsys.readouterr().err.split())
    assert run("compact", "--codec.align", "16", "--codec.tile", "40", "--model", vlm) == 2
    assert "tile 40 is no multiple of align 16" in " ".join(capsys.readouterr().err.split())


def test_text_stands_before_the_image_of_a_question(processor) -> None:
    """Any number of words up to the most, of the training questions; with and without the answer the same."""
    rows = source.load(SourceConfig(source="pages", split="train", size=16))
    data = Questions(rows, rows.select([0, 1]), processor, batch=16).served(words_before=12)
    plain = Questions(rows, rows, processor, batch=16)
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    (batch,), (bare,) = list(data.train_dataloader()), list(plain.train_dataloader())

    def places(of: Batch) -> list[int]:
        """Of the images, counted within each row's own tokens."""
        ids, mask = of.inputs["input_ids"], of.inputs["attention_mask"].bool()
        return [row[kept].tolist().index(image) for row, kept in zip(ids, mask, strict=True)]

    assert set(places(bare)) == {1} and len(set(places(batch))) > 5
    assert torch.equal(batch.answers, bare.answers) and batch.alignment == AT_SPANS
    again = next(iter(data.train_dataloader()))
    assert torch.equal(batch.inputs["input_ids"], again.inputs["input_ids"])
    words = {word for prompt in rows["prompt"] for word in prompt.split()}
    texts = [data._text_before(number) for number in range(40)]
    assert all(set(text.split()) <= words for text in texts)
    assert {len(text.split()) for text in texts} == set(range(13))
    assert data._text_before(3) == data._text_before(3)


def test_a_number_of_words_below_zero_is_refused(capsys) -> None:
    assert main(["transform", "--words_before", "-1"]) == 2
    assert "--words-before -1: it is a number of words, 0 or more" in " ".join(capsys.readouterr().err.split())

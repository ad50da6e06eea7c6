"""Evaluation: methods that must come out as they are known to, and bytes that match."""

import datasets
import pytest
import torch
from rich.progress import Progress
from support.noise_capsules import LAYERS, TOKEN_BYTES, TOKENS

from kvcapsule.eval.ask_first import AskFirst
from kvcapsule.eval.batches import Batch, batches
from kvcapsule.eval.divergence import divergence
from kvcapsule.eval.entries import FULL, Entry, full_entry
from kvcapsule.eval.quality import Answering, Tally, answered, evaluate, prompt_bytes
from kvcapsule.eval.watched_generate import generate, new_cache, stored_bytes
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.policy import Full
from kvcapsule.testbeds import pages


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return pages.pages("test", 4)


@pytest.fixture(scope="module")
def batch(rows, model, processor) -> Batch:
    (made,) = batches(rows, model, processor, size=4)
    return made


@pytest.fixture(scope="module")
def tallies(model, processor, rows, make_capsule) -> dict[str, Tally]:
    compared = [
        full_entry(),
        Entry("segments", Full(), FULL),
        Entry("identity", make_capsule(1, "identity", tile=50), "identity"),
        Entry("noise", make_capsule(0.2), "kvcapsule"),
    ]
    return evaluate(model, processor, rows, compared, Answering(2, 6), progress=Progress(disable=True))


def test_full_cache_is_its_own_yardstick(tallies) -> None:
    full = tallies[FULL]
    assert full.count == full.same == 4
    assert full.divergence == 0
    # Every token of the answers but the first, which no compressed cache has a part in.
    assert full.positions == sum(full.tokens.values()) - 4 > 0


@pytest.mark.parametrize("name", ["segments", "identity"])
def test_what_keeps_everything_changes_nothing(tallies, name: str) -> None:
    assert tallies[name].same == 4
    assert tallies[name].divergence / tallies[name].positions < 1e-9
    assert tallies[name].scores == tallies[FULL].scores
    assert tallies[name].positions == tallies[FULL].positions


def test_what_destroys_the_image_shows(tallies) -> None:
    assert tallies["noise"].same < 4
    assert tallies["noise"].divergence / tallies["noise"].positions > 0.01


def test_bytes_by_hand(tallies) -> None:
    full, noise = tallies[FULL], tallies["noise"]
    assert full.visual == 4 * LAYERS * TOKENS * TOKEN_BYTES
    assert full.parameters == 0 and full.total > full.visual
    # 40 of 196 rows of keys and of values; a rotation (one angle for two channels) and an owner for each tile, the
    # rotation once for all layers of a batch.
    assert noise.visual == 4 * (LAYERS * 40 * TOKEN_BYTES + 2 * 16 * 4) + 2 * _owners(rows=2)
    # theta and the basis, and mu: of one capsule, however many batches read it.
    assert noise.parameters == LAYERS * 2 * 4 * (TOKENS * 40 * 2 + 32)


def _owners(rows: int) -> int:
    """Bytes of the owners of a batch's tiles, which all layers share."""
    return rows * 8


def test_full_cache_counts_visual_positions_and_nothing_else(model, batch) -> None:
    cache = new_cache(model, None)
    with torch.no_grad():
        model(**batch.inputs, **cache_argument(cache))
    held = stored_bytes(cache, batch.layout)
    marked = int((batch.inputs["input_ids"] == model.config.image_token_id).sum())
    assert held.visual == LAYERS * marked * TOKEN_BYTES
    assert held.total == LAYERS * batch.inputs["input_ids"].numel() * TOKEN_BYTES


def test_teacher_forcing_reads_the_compressed_cache(model, batch, make_capsule) -> None:
    """The first logits are the exact prefill's; those behind it are not, and they are those of the forced tokens."""
    full = generate(model, batch.inputs, new_cache(model, None), batch.layout, max_new_tokens=4)
    destroyer = make_capsule(0.2)
    with attach(model):
        forced = generate(model, batch.inputs, new_cache(model, destroyer), batch.layout, 4, forced=full.tokens)
        exact = generate(model, batch.inputs, new_cache(model, Full()), batch.layout, 4, forced=full.tokens)
    assert torch.equal(forced.tokens, full.tokens)
    torch.testing.assert_close(forced.logits[0], full.logits[0])
    assert (forced.logits[1] - full.logits[1]).abs().max() > 0.1
    for own, theirs in zip(exact.logits, full.logits, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=1e-4)


def test_divergence_is_that_of_the_answer_of_the_full_cache(model, processor, rows, batch, make_capsule) -> None:
    """Against a loop that feeds this answer to the model by hand, for a method that would have answered otherwise."""
    destroyer = make_capsule(0.2)
    compared = [full_entry(), Entry("noise", destroyer, "kvcapsule")]
    tally = evaluate(model, processor, rows, compared, Answering(4, 5), progress=Progress(disable=True))["noise"]
    assert tally.same < 4
    inputs = dict(batch.inputs)
    answer = generate(model, batch.inputs, new_cache(model, None), batch.layout, max_new_tokens=5).tokens
    there = answered(answer, model.generation_config.eos_token_id)
    logits = []
    for method in (Full(), destroyer):
        with attach(model), torch.no_grad():
            cache, mask = new_cache(model, method), inputs["attention_mask"]
            model(**inputs, **cache_argument(cache), position_ids=(mask.cumsum(1) - 1).clamp_min(0))
            steps = []
            for token in answer[:, :-1].split(1, dim=1):
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                position = mask.sum(1, keepdim=True) - 1
                steps.append(
                    model(input_ids=token, attention_mask=mask, **cache_argument(cache), position_ids=position).logits[
                        :, -1
                    ]
                )
        logits.append(torch.stack(steps, dim=1)[there[:, 1:]])
    assert tally.divergence == pytest.approx(divergence(*logits).sum().item(), rel=1e-3)


def test_answers_end_with_their_first_end_token() -> None:
    tokens = torch.tensor([[5, 9, 0, 0], [9, 9, 5, 5], [5, 5, 5, 5]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    assert torch.equal(answered(tokens, 9), expected)
    assert torch.equal(answered(tokens, [9, 7]), expected)
    assert answered(tokens, None).all()


def test_full_cache_must_come_first(model, processor, rows) -> None:
    with pytest.raises(ValueError, match="first entry"):
        evaluate(model, processor, rows, [Entry("segments", Full(), FULL)], Answering(2, 2), Progress(disable=True))


def test_prompts_are_weighed_as_the_run_weighs_them(model, rows, tallies, make_capsule, processor) -> None:
    """Visual and text, of two batches of two."""
    assert (
        prompt_bytes(model, [AskFirst(batch) for batch in batches(rows, model, processor, 2)], make_capsule(0.2))
        == tallies["noise"].total
    )

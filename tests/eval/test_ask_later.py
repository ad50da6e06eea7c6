"""Questions that are asked after their images are compressed: exact where nothing is lost, and read once."""

from collections.abc import Sequence
from typing import Any

import datasets
import pytest
import torch
from rich.progress import Progress

from kvcapsule.data.batches import read_question
from kvcapsule.errors import DataError, InputError
from kvcapsule.eval import prefixes
from kvcapsule.eval.ask_first import AskFirst
from kvcapsule.eval.ask_later import AskLater
from kvcapsule.eval.entries import FULL, Entry, full_entry
from kvcapsule.eval.prefixes import cut_prompts
from kvcapsule.eval.protocol_names import ASK_FIRST, ASK_LATER
from kvcapsule.eval.quality import Answering, Tally, evaluate, prompt_bytes
from kvcapsule.eval.timing import time_entries
from kvcapsule.eval.watched_generate import Generated
from kvcapsule.inference.attach import attach
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import POLICIES, Full
from kvcapsule.testbeds.pages import page

PROMPTS = ("Read line 2.", "What is the number beside the owl?", "How many 3s?")
QUIET = Progress(disable=True)


def table(*questions: tuple[Sequence[int], str]) -> datasets.Dataset:
    """Rows of pages by number, and a prompt."""
    pages = [[page("test", number).image for number in numbers] for numbers, _ in questions]
    rows = {
        "image": pages,
        "prompt": [prompt for _, prompt in questions],
        "answer": ["1"] * len(pages),
        "task": [f"task {len(prompt) % 2}" for _, prompt in questions],
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Sequence(datasets.Image()))


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    """Three questions about one page and one about two others, in turns; prefixes of unlike length in a batch; text
    before an image."""
    mixed = [
        ((0,), PROMPTS[0]),
        ((1, 2), PROMPTS[1]),
        ((0,), PROMPTS[1]),
        ((3,), f"What stands here? <image> {PROMPTS[0]}"),
    ]
    return table(*mixed, ((0,), PROMPTS[2]))


@pytest.fixture(scope="module")
def entries(make_capsule) -> list[Entry]:
    return [
        full_entry(),
        Entry("segments", Full(), FULL),
        Entry("identity", make_capsule(1, "identity", tile=50), "identity"),
        Entry("noise", make_capsule(0.2), "kvcapsule"),
    ]


def answers(model: Any, block: AskFirst | AskLater, method: Method | None = None) -> list[Generated]:
    if method is None:
        return [ask(6) for ask in block.asks(model, None)]
    with attach(model, method):
        return [ask(6) for ask in block.asks(model, method)]


def alone(rows: datasets.Dataset) -> list[Any]:
    return [read_question(rows[i], i) for i in range(len(rows))]


@pytest.mark.parametrize("shared", [False, True])
def test_the_full_cache_answers_as_if_asked_first(model, processor, rows, shared: bool) -> None:
    """Tokens, and logits to rounding: of a batch with padding before prefixes and before questions."""
    together = AskLater.of(alone(rows), model, processor)
    if shared:
        together.record(model, hidden=False)
    for method in (None, Full()):
        (later,) = answers(model, together, method)
        for row, question in enumerate(alone(rows)):
            (first,) = answers(model, AskFirst.of([question], model, processor))
            assert torch.equal(later.tokens[row, : first.tokens.shape[1]], first.tokens[0])
            for ours, theirs in zip(later.logits, first.logits, strict=False):
                torch.testing.assert_close(ours[row], theirs[0], rtol=0, atol=5e-5)


@pytest.fixture(scope="module", params=[True, False], ids=["shared prefill", "own prefills"])
def tallies(request, model, processor, rows, entries) -> dict[str, Tally]:
    answering = Answering(2, 6, share_prefill=request.param, protocol=ASK_LATER)
    return evaluate(model, processor, rows, entries, answering, QUIET)


def test_what_keeps_everything_changes_nothing(tallies) -> None:
    full = tallies[FULL]
    assert (full.count, full.same, full.first_divergence, full.divergence) == (5, 5, 0, 0)
    # Every token of the answers: none is exact by itself.
    assert full.positions == sum(full.tokens.values())
    for name in ("segments", "identity"):
        assert tallies[name].same == 5
        assert tallies[name].first_divergence < 1e-8 and tallies[name].divergence < 1e-8
        assert tallies[name].scores == full.scores


def test_what_destroys_the_image_shows_in_the_first_token(tallies, model, processor, rows, entries) -> None:
    noise = tallies["noise"]
    assert noise.first_divergence / noise.count > 0.01 and noise.divergence > noise.first_divergence
    first = evaluate(model, processor, rows, entries, Answering(2, 6, protocol=ASK_FIRST), QUIET)["noise"]
    assert first.first_divergence < 1e-8


def test_both_protocols_have_the_same_full_cache(tallies, model, processor, rows) -> None:
    first = evaluate(model, processor, rows, [full_entry()], Answering(2, 6, protocol=ASK_FIRST), QUIET)[FULL]
    assert sorted(first.answers) == sorted(tallies[FULL].answers)


def test_questions_about_an_image_share_its_prefix(model, processor, rows, entries) -> None:
    """The vision tower sees each image once for all questions and methods; parts are of at most two questions."""
    images = []
    handle = model.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: images.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    try:
        evaluate(model, processor, rows, entries, Answering(2, 6, share_prefill=True, protocol=ASK_LATER), QUIET)
    finally:
        handle.remove()
    assert sum(images) == 4
    blocks = list(AskLater.blocks(rows, model, processor, 2, QUIET))
    asked = [[question.prompt for question in part] for block in blocks for part in block.parts]
    assert sorted(map(len, asked)) == [1, 2, 2]
    (several,) = [block for block in blocks if len(block.parts) == 2]
    assert len(several.prefixes.lengths) == 1
    assert {q.prompt for part in several.parts for q in part} == set(PROMPTS)


def test_text_before_an_image_tells_prefixes_apart(model, processor) -> None:
    rows = table(((0,), "Here: <image> Read it."), ((0,), "And now: <image> Read it."), ((0,), "Here: <image> Why?"))
    (block,) = AskLater.blocks(rows, model, processor, 4, QUIET)
    assert len(block.prefixes.lengths) == 2 and sum(map(len, block.parts)) == 3
    (later,) = answers(model, block, Full())
    for question, tokens in zip(block.parts[0], later.tokens, strict=True):
        (same,) = [q for q in alone(rows) if q.prompt == question.prompt]
        (first,) = answers(model, AskFirst.of([same], model, processor))
        assert torch.equal(tokens[: first.tokens.shape[1]], first.tokens[0])


def test_a_question_without_images_is_asked_behind_the_first_token(model, processor) -> None:
    rows = table(((), "What now?"), ((0,), PROMPTS[0]), ((), "What now?"))
    (block,) = AskLater.blocks(rows, model, processor, 4, QUIET)
    assert sorted(block.prefixes.lengths) == [1, 197]
    (later,) = answers(model, block, Full())
    (first,) = answers(model, AskFirst.of(alone(rows), model, processor))
    for question, tokens in zip(block.parts[0], later.tokens, strict=True):
        same = first.tokens[1 if question.prompt == PROMPTS[0] else 0]
        length = min(len(same), len(tokens))
        assert torch.equal(tokens[:length], same[:length])


def test_blocks_of_questions_without_images(model, processor) -> None:
    """They are answered; where there is no image at all, nothing can be compared."""
    rows = table(((), "What now?"), ((0,), PROMPTS[0]), ((), "And then?"))
    counts = [len(block.parts[0]) for block in AskLater.blocks(rows, model, processor, 1, QUIET)]
    assert counts == [1, 1, 1]
    tally = evaluate(model, processor, rows, [full_entry()], Answering(1, 4, protocol=ASK_LATER), QUIET)[FULL]
    assert tally.count == 3
    with pytest.raises(DataError, match="none of the questions has an image"):
        list(AskLater.blocks(rows.select([0, 2]), model, processor, 4, QUIET))


class Noted(Full):
    """Everything, and what was seen of it."""

    def __init__(self) -> None:
        self.seen: list[LayerPrefill] = []

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.seen.append(prefill)
        return super().compress(prefill)


def test_methods_see_nothing_behind_the_last_image(model, processor, rows) -> None:
    noted = Noted()
    block = AskLater.of(alone(rows), model, processor)
    answers(model, block, noted)
    assert len(noted.seen) == len(model.get_decoder().layers)
    for prefill in noted.seen:
        visual = prefill.visual()
        assert bool(visual[:, -1].all()) and prefill.keys.shape[2] == visual.shape[1]


@pytest.mark.parametrize("name", ["snapkv", "vl-cache", "aircache", "post-vision-attention"])
def test_a_policy_that_ranks_by_the_question_stores_the_same_for_all(model, processor, name: str) -> None:
    """Asked first it does not."""
    policy = POLICIES[name](0.1)
    assert policy.reads_question

    def kept(kind: type[AskFirst] | type[AskLater], prompt: str) -> torch.Tensor:
        (question,) = alone(table(((0,), prompt)))
        block = kind.of([question], model, processor)
        stored: list[torch.Tensor] = []

        class Kept(type(policy)):
            def begin_pass(self, layers):
                passed = super().begin_pass(layers)

                class Noting:
                    def add(self, prefill):
                        added = passed.add(prefill)
                        stored.extend(
                            s.keys for _, one in added for s in one.visual if isinstance(s.keys, torch.Tensor)
                        )
                        return added

                return Noting()

        answers(model, block, Kept(0.1))
        return torch.cat([keys.flatten() for keys in stored])

    one, other = (kept(AskLater, prompt) for prompt in PROMPTS[:2])
    assert torch.equal(one, other)
    one, other = (kept(AskFirst, prompt) for prompt in PROMPTS[:2])
    assert one.shape != other.shape or not torch.equal(one, other)


def test_bytes_are_of_the_prefix(model, processor, rows, make_capsule, tallies, entries) -> None:
    """What they match by is what is measured, with and without a shared prefill; a question on a shared prefix counts
    the copy that it reads."""
    noise = make_capsule(0.2)
    blocks = list(AskLater.blocks(rows, model, processor, 2, QUIET))
    assert prompt_bytes(model, blocks, noise) == tallies["noise"].total
    width = max(block.prefixes.layout.valid.shape[1] for block in blocks)
    (alone_block,) = AskLater.blocks(table(((0,), PROMPTS[0])), model, processor, 2, QUIET)
    full = evaluate(
        model, processor, table(((0,), PROMPTS[0])), [full_entry()], Answering(2, 2, protocol=ASK_LATER), QUIET
    )[FULL]
    (length,) = alone_block.prefixes.lengths
    assert length < width and full.total == length * 4 * 2 * 2 * 32 * 4
    assert full.visual == 196 * 4 * 2 * 2 * 32 * 4


def test_the_timing_reads_the_prefix_too(model, processor, rows, entries) -> None:
    answering = Answering(2, 4, protocol=ASK_LATER)
    timed = time_entries(model, processor, rows, entries[:2], answering, QUIET, rounds=1, steps=2)
    assert timed[FULL] == (1.0, 1.0) and all(0 < ratio < 100 for ratio in timed["segments"])


def test_a_shared_prefix_changes_nothing_for_any_kind_of_policy(model, processor, rows) -> None:
    """One that reads hidden states, one with a shared budget, one that acts while the answer is written, one that
    fetches rows from the host."""
    policies = [
        Entry("akvq-vl", POLICIES["akvq-vl"](recent=8), FULL),
        Entry("vl-cache", POLICIES["vl-cache"](0.5), FULL),
        Entry("r-kv", POLICIES["r-kv"](budget_tokens=4, buffer=2, window=2), FULL),
        Entry("hybridkv", POLICIES["hybridkv"](0.5), FULL),
    ]
    rows = rows.select(range(3))
    own, shared = (
        evaluate(
            model,
            processor,
            rows,
            [full_entry(), *policies],
            Answering(3, 4, share_prefill=share, protocol=ASK_LATER),
            QUIET,
        )
        for share in (False, True)
    )
    for name, tally in own.items():
        assert shared[name].answers == tally.answers, name
        assert (shared[name].total, shared[name].visual) == (tally.total, tally.visual), name
        assert shared[name].divergence == pytest.approx(tally.divergence, abs=1e-4), name


def test_a_prompt_that_ends_with_an_image_is_refused(model, processor, monkeypatch) -> None:
    question = alone(table(((0,), "Read it.")))[0]
    encode = prefixes.encode_questions

    def cut(questions, model, processor):
        inputs, spans = encode(questions, model, processor)
        end = spans[0].start + spans[0].length
        return type(inputs)({k: v[:, :end] if v.dim() == 2 else v for k, v in inputs.items()}), spans

    monkeypatch.setattr(prefixes, "encode_questions", cut)
    with pytest.raises(InputError, match=r"'Read it\.' ends with an image, .*--protocol ask-first"):
        cut_prompts([question], model, processor)

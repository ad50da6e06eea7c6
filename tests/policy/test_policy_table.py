"""What every policy promises, in one table: all of POLICIES are in it, and a policy has a line here only where it needs
one."""

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace
from typing import Any

import pytest
import torch
from support.builders import rand
from support.prefills import alone
from transformers import BatchFeature, DynamicCache, LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.kernels.reference import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Compressed, Method
from kvcapsule.policy import POLICIES, Full
from kvcapsule.segments.segment import Segment, storage_bytes
from kvcapsule.vlm.spans import VisualSpan

EXACT, BYTES, BATCH, DETERMINISM, BEAMS, TURNS = "exact", "bytes", "batch", "determinism", "beams", "turns"
QUESTION = "question"
PROPERTIES = {
    EXACT: "at budget 1, or without a budget, answers and beams are the full cache's, in a second turn too",
    BYTES: "the budget says what share of the bytes is stored, within 2 %",
    BATCH: "a row in a batch is as it is alone",
    DETERMINISM: "the same prefill gives the same segments",
    BEAMS: "rows can be repeated, swapped and left out",
    TURNS: "a later turn leaves what is stored of an earlier one as it is",
    QUESTION: "reads_question says whether visual tokens are stored otherwise behind another question",
}


@dataclass(frozen=True)
class Case:
    """A policy's line."""

    settings: dict[str, Any] = field(default_factory=dict)
    """What it needs on small prompts, beside its budget."""
    but: dict[str, str] = field(default_factory=dict)
    """Properties that it does not have, each with the reason."""


TABLE = {
    "snapkv": Case({"window": 6}),
    "pyramidkv": Case({"window": 6}),
    "adakv": Case({"window": 6}),
    "mixkv": Case({"window": 6}),
    "quantized": Case({"bits": 8}, {EXACT: "all tokens are kept, but rounded"}),
    "fp8": Case(but={EXACT: "all tokens are kept, but rounded"}),
    "turboquant": Case({"bits": 4}, {EXACT: "all tokens are kept, but rounded"}),
    "kivi": Case({"bits": 4}, {EXACT: "all tokens are kept, but rounded"}),
    "akvq-vl": Case(
        {"pivots": 0, "recent": 8},
        {EXACT: "all tokens are kept, but rounded", QUESTION: "it does by its pivots, of which there are none here"},
    ),
}


def every(what: str, dialled: bool = False) -> pytest.MarkDecorator:
    """All policies with the property."""
    return pytest.mark.parametrize(
        "name", [n for n in POLICIES if what not in case(n).but and (POLICIES[n].budget_field or not dialled)]
    )


def case(name: str) -> Case:
    return TABLE.get(name, Case())


def make(name: str, budget: float) -> Method:
    policy = POLICIES[name]
    return policy(**case(name).settings, **({policy.budget_field: budget} if policy.budget_field else {}))


def test_the_table_is_sound() -> None:
    assert set(TABLE) <= set(POLICIES)
    for name, policy in POLICIES.items():
        assert policy.budget_field in (None, "retention", "budget"), name
        known = [f.name for f in fields(policy)]
        assert policy.budget_field is None or policy.budget_field in known, name
        frozen = make(name, 0.5)
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, (known or ["any"])[0], 1)
        assert set(case(name).but) <= set(PROPERTIES), name
        assert all(len(reason) > 10 for reason in case(name).but.values()), f"{name}: say why"


# On prefills of random numbers

LAYERS, HEADS, GROUP, DIM = 4, 2, 2, 16


def layers(spans: Sequence[tuple[int, int, int]], padding: Sequence[int], count: int) -> list[LayerPrefill]:
    """Rows of `count` tokens in float64, the first of each padded; every layer has its own numbers."""
    rows = len(padding)
    valid = torch.arange(count) >= torch.tensor(padding)[:, None]
    visual = [VisualSpan(row, begin, length, (1, 1, length)) for row, begin, length in spans]
    drawn = [
        [rand(rows, h, count, DIM, seed=9 * i + j) for j, h in enumerate((HEADS * GROUP, HEADS, HEADS))]
        for i in range(LAYERS)
    ]
    return [
        LayerPrefill(layer=i, query=query, keys=keys, values=values, spans=visual, valid=valid, scale=DIM**-0.5)
        for i, (query, keys, values) in enumerate(drawn)
    ]


MIXED = layers([(0, 12, 40), (1, 2, 40), (1, 44, 9)], [9, 0, 50], 64)
"""Left padding; one image, two with text between, none; spans of unlike length."""
LONG = layers([(0, 20, 400), (0, 480, 350)], [0], 900)
"""One row: rows of a batch that keep unlike counts may be padded (kvcapsule.methods.kept_rows.gather_kept), whatever
the policy."""


def compressed(method: Method, of: Sequence[LayerPrefill]) -> list[Compressed]:
    """What a cache would store, layer by layer."""
    run = method.begin_pass([p.layer for p in of])
    done = dict(pair for prefill in of for pair in run.add(prefill))
    return [done[p.layer] for p in of]


def read(layer: Compressed, query: torch.Tensor, select: torch.Tensor | None = None) -> torch.Tensor:
    """What a query gets, of a tail of one written token besides."""
    segments = [*layer.visual, *layer.text]
    written = Segment(*rand(2, 1, HEADS, 1, DIM, seed=5).expand(-1, len(query), -1, -1, -1), torch.arange(len(query)))
    return attend(query, [*(segments if select is None else [s.select(select) for s in segments]), written], 0.3)


QUERY = rand(3, HEADS * GROUP, 2, DIM, seed=99)


def held(segments: Sequence[Segment]) -> int:
    return storage_bytes(t for s in segments for t in s.entry_tensors())


@every(BYTES, dialled=True)
@pytest.mark.parametrize("budget", [0.3, 0.1])
def test_bytes_fall_as_the_budget_promises(name: str, budget: float) -> None:
    """Of the visual tokens, with the text as it was, or of all."""
    ours, full = compressed(make(name, budget), LONG), compressed(Full(), LONG)
    visual, text, whole, raw = (sum(map(held, parts)) for one in (ours, full) for parts in zip(*one, strict=True))
    if POLICIES[name].budget_field == "retention":
        assert visual == pytest.approx(budget * whole, rel=0.02)
        assert text == raw
    else:
        assert visual + text == pytest.approx(budget * (whole + raw), rel=0.02)


@every(BATCH)
def test_a_batch_is_its_rows_one_by_one(name: str) -> None:
    """Left padding, several images and no image at all included."""
    method = make(name, 0.3)
    together = [read(layer, QUERY) for layer in compressed(method, MIXED)]
    for row in range(3):
        for one, all_rows in zip(compressed(method, [alone(of, row) for of in MIXED]), together, strict=True):
            torch.testing.assert_close(read(one, QUERY[row : row + 1]), all_rows[row : row + 1])


@every(DETERMINISM)
def test_the_same_prefill_gives_the_same_segments(name: str) -> None:
    """To the last bit of what is read, and to the last byte of what is stored."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        found.append(
            [(read(layer, QUERY), held([*layer.visual, *layer.text])) for layer in compressed(make(name, 0.3), MIXED)]
        )
    for (ours, size), (again, same) in zip(*found, strict=True):
        assert torch.equal(ours, again) and size == same


@every(BEAMS)
def test_rows_can_be_chosen(name: str) -> None:
    rows = torch.tensor([1, 1, 0])
    for layer in compressed(make(name, 0.3), MIXED):
        torch.testing.assert_close(read(layer, QUERY[rows], rows), read(layer, QUERY)[rows])


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_without_images(name: str) -> None:
    """Stores no visual segment, and something of the text."""
    for layer in compressed(make(name, 0.3), layers([], [0, 7], 40)):
        assert not layer.visual
        assert {int(row) for s in layer.text for row in s.owner} == {0, 1}


@every(QUESTION)
def test_whether_it_reads_the_question_is_known(name: str) -> None:
    """What is stored of the visual tokens changes with the text behind them, or it does not."""
    query, found = QUERY[:1], []
    for seed in (1, 2):
        asked = []
        for i, of in enumerate(layers([(0, 12, 200)], [0], 260)):
            texts = [rand(1, t.shape[1], 48, DIM, seed=100 * seed + 9 * i + j) for j, t in enumerate(_qkv(of))]
            behind = [torch.cat([t[:, :, :212], 3 * text], dim=2) for t, text in zip(_qkv(of), texts, strict=True)]
            asked.append(replace(of, query=behind[0], keys=behind[1], values=behind[2]))
        found.append([read(layer._replace(text=[]), query) for layer in compressed(make(name, 0.3), asked)])
    differs = any(not torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert differs == POLICIES[name].reads_question


def _qkv(of: LayerPrefill) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return of.query, of.keys, of.values


# Through a model

PROMPTS = ((1, "Read line 2."), (2, "Transcribe the page."), (0, "What is the number beside the owl?"))
"""One image, several, none; with left padding."""
LATER = [
    f"<|user|>And here? {'<image>' * 196}<|assistant|>",
    "<|user|>Read line 3.<|assistant|>",
    "<|user|>And beside the fox?<|assistant|>",
]
"""A second turn: a new image for one row alone."""

Model = LlavaForConditionalGeneration
Talk = Callable[[Any], tuple[Any, Any]]


def run(model: Model, batch: Any, cache: Any, **options: Any) -> Any:
    return model.generate(**batch, **cache_argument(cache), do_sample=False, return_dict_in_generate=True, **options)


@pytest.fixture(scope="module")
def talk(model: Model, make_batch: Callable[..., BatchFeature], processor: LlavaProcessor) -> Talk:
    """talk(cache): the outputs of two turns; six tokens each that neither end early nor look like an image."""
    batch, pixels = make_batch(*PROMPTS), make_batch((4, ""))["pixel_values"][3:]
    banned = processor.tokenizer.convert_tokens_to_ids("<image>")
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "suppress_tokens": [banned],
        "output_logits": True,
    }
    asked = processor.tokenizer(LATER, padding=True, return_tensors="pt")

    def two_turns(cache: Any) -> tuple[Any, Any]:
        first = run(model, batch, cache, **options)
        ids = torch.cat([first.sequences, asked["input_ids"]], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 6, dtype=torch.long), asked["attention_mask"]], dim=1)
        return first, run(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, cache, **options)

    return two_turns


@pytest.fixture(scope="module")
def own(model: Model, talk: Talk) -> tuple[Any, Any]:
    return talk(DynamicCache(config=model.config))


@every(EXACT)
def test_at_dial_one_a_conversation_is_the_full_caches(
    name: str, model: Model, talk: Talk, own: tuple[Any, Any]
) -> None:
    with attach(model):
        found = talk(CapsuleCache(model.config, make(name, 1.0)))
    for ours, theirs in zip(found, own, strict=True):
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=5e-5)


@pytest.fixture(scope="module")
def beams(model: Model, make_batch: Callable[..., BatchFeature]) -> Callable[[Any], torch.Tensor]:
    """beams(cache): the tokens of two beams, which change places on the way."""
    batch = make_batch((1, "Read line 2."), (0, "What is the number?"))

    def search(cache: Any) -> torch.Tensor:
        found: torch.Tensor = run(model, batch, cache, max_new_tokens=4, min_new_tokens=4, num_beams=2).sequences
        return found

    return search


@pytest.fixture(scope="module")
def own_beams(model: Model, beams: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    return beams(DynamicCache(config=model.config))


@every(EXACT)
def test_at_dial_one_beams_are_the_full_caches(
    name: str, model: Model, beams: Callable[[Any], torch.Tensor], own_beams: torch.Tensor
) -> None:
    with attach(model):
        assert torch.equal(beams(CapsuleCache(model.config, make(name, 1.0))), own_beams)


def forward(
    model: Model, cache: CapsuleCache, ids: torch.Tensor, mask: torch.Tensor, **images: torch.Tensor
) -> torch.Tensor:
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, **cache_argument(cache), **images
        ).logits
    return logits


@every(BEAMS)
def test_the_rows_of_a_cache_change_places(name: str, model: Model, make_batch: Callable[..., BatchFeature]) -> None:
    """What beam search asks of a cache, with rows that are not alike."""
    batch, rows = make_batch(*PROMPTS[:2]), torch.tensor([1, 0])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], dim=1)
    token, logits = torch.tensor([[40], [41]]), []
    with attach(model):
        for order in (torch.arange(2), rows):
            cache = CapsuleCache(model.config, make(name, 0.3))
            forward(model, cache, batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"])
            cache.reorder_cache(order)
            logits.append(forward(model, cache, token[order], mask[order]))
    assert float((logits[0][0] - logits[0][1]).abs().max()) > 0.1
    torch.testing.assert_close(logits[1], logits[0][rows], rtol=0, atol=5e-5)


@every(TURNS)
def test_a_later_turn_leaves_the_earlier_one_as_it_is(
    name: str, model: Model, make_batch: Callable[..., BatchFeature], processor: LlavaProcessor
) -> None:
    """What was stored stays, the new image is stored beside it for its own row, and positions go on."""
    batch, asked = make_batch(*PROMPTS), processor.tokenizer(LATER, padding=True, return_tensors="pt")
    mask = torch.cat([batch["attention_mask"], asked["attention_mask"]], dim=1)
    with attach(model):
        cache = CapsuleCache(model.config, make(name, 0.3))
        forward(model, cache, batch["input_ids"], batch["attention_mask"], pixel_values=batch["pixel_values"])
        layers = [layer for layer in cache.layers if isinstance(layer, CapsuleLayer)]
        before = [(list(layer.visual), list(layer.text)) for layer in layers]
        logits = forward(model, cache, asked["input_ids"], mask, pixel_values=make_batch((4, ""))["pixel_values"][3:])
    assert cache.get_seq_length() == mask.shape[1] and bool(logits.isfinite().all())
    for layer, (visual, text) in zip(layers, before, strict=True):
        assert [s is t for s, t in zip(layer.visual, visual, strict=False)] == [True] * len(visual)
        assert [s is t for s, t in zip(layer.text, text, strict=False)] == [True] * len(text)
        images, words = (
            {int(row) for s in new for row in s.owner} for new in (layer.visual[len(visual) :], layer.text[len(text) :])
        )
        assert images == {0} and images | words == {0, 1, 2}

"""Evaluation: methods that must come out as they are known to, bytes that match, pictures that can be read, input that is refused."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import datasets
import pytest
import torch
from builders import rand
from matplotlib.text import Text
from PIL import Image
from rich.progress import Progress

from kvcapsule.capsule import Capsule, CapsuleConfig
from kvcapsule.cli.errors import InputError
from kvcapsule.cli.results import command_line, shown_path, write_whole
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.data import pages
from kvcapsule.eval import compare, timing
from kvcapsule.eval import main as command
from kvcapsule.eval.generation import generate, held_bytes, new_cache
from kvcapsule.eval.main import main
from kvcapsule.eval.matching import TOLERANCE, PerLayer, match
from kvcapsule.eval.methods import FIXED, FULL, RIVALS, TEXT, Entry, build, chosen, entries, full_entry, open_capsules
from kvcapsule.eval.metrics import divergence
from kvcapsule.eval.plot import draw, picture
from kvcapsule.eval.questions import Batch, batches
from kvcapsule.eval.runner import Tally, answered, evaluate, prompt_bytes
from kvcapsule.eval.timing import time_entries
from kvcapsule.files import to_json
from kvcapsule.geometry import KVGeometry
from kvcapsule.inference import attach
from kvcapsule.method import start
from kvcapsule.policy import POLICIES, EvenlySpaced, Full, PyramidKV
from kvcapsule.prefill import Compressed, LayerPrefill, Method
from kvcapsule.quantize import QuantizedRows
from kvcapsule.segment import Segment, storage_bytes
from kvcapsule.spans import VisualSpan

LAYERS, TOKENS = 4, 196
TOKEN_BYTES = 2 * 2 * 32 * 4
"""Of one token in one layer: keys and values, 2 KV heads of 32, float32."""


@pytest.fixture(scope="module")
def rows() -> datasets.Dataset:
    return pages.pages("test", 4)


@pytest.fixture(scope="module")
def geometry(model) -> KVGeometry:
    return KVGeometry.from_config(model.config)


@pytest.fixture(scope="module")
def batch(rows, model, processor) -> Batch:
    (made,) = batches(rows, model, processor, size=4)
    return made


@pytest.fixture(scope="module")
def make_capsule(geometry) -> Callable[..., Capsule]:
    """make_capsule(0.2): a capsule of this ratio whose maps are noise, so that it destroys what it stores."""

    def build(ratio: float, family: str = "kvcapsule", tile: int = TOKENS) -> Capsule:
        codec = IdentityConfig(tile) if family == "identity" else KVCapsuleConfig(tile, True, (ratio,) * LAYERS, (ratio,) * LAYERS)
        capsule = Capsule(CapsuleConfig(family, codec, geometry, "tiny")).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for tensor in capsule.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        return capsule

    return build


@pytest.fixture(scope="module")
def vlm(tmp_path_factory, model, processor) -> str:
    folder = tmp_path_factory.mktemp("vlm")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def capsule_folder(tmp_path_factory, make_capsule) -> Path:
    folder = tmp_path_factory.mktemp("capsules") / "fifth"
    make_capsule(0.2).save_pretrained(folder, metrics={"train": {"loss": 0.5}})
    return folder


# Quality


@pytest.fixture(scope="module")
def tallies(model, processor, rows, make_capsule) -> dict[str, Tally]:
    compared = [
        full_entry(),
        Entry("segments", Full(), FULL),
        Entry("identity", make_capsule(1, "identity", tile=50), "identity"),
        Entry("noise", make_capsule(0.2), "kvcapsule"),
    ]
    return evaluate(model, processor, rows, compared, size=2, max_new_tokens=6, progress=Progress(disable=True))


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
    # 40 of 196 rows of keys and of values; a rotation (one angle for two channels) and an owner for each tile, the rotation once for all
    # layers of a batch.
    assert noise.visual == 4 * (LAYERS * 40 * TOKEN_BYTES + 2 * 16 * 4) + 2 * _owners(rows=2)
    # theta and the basis, and mu: of one capsule, however many batches read it.
    assert noise.parameters == LAYERS * 2 * 4 * (TOKENS * 40 * 2 + 32)


def _owners(rows: int) -> int:
    """Bytes of the owners of a batch's tiles, which all layers share."""
    return rows * 8


def test_full_cache_counts_visual_positions_and_nothing_else(model, batch) -> None:
    cache = new_cache(model, None)
    with torch.no_grad():
        model(**batch.inputs, past_key_values=cache)
    held = held_bytes(cache, batch.layout)
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
    tally = evaluate(model, processor, rows, compared, size=4, max_new_tokens=5, progress=Progress(disable=True))["noise"]
    assert tally.same < 4
    inputs = dict(batch.inputs)
    answer = generate(model, batch.inputs, new_cache(model, None), batch.layout, max_new_tokens=5).tokens
    there = answered(answer, model.generation_config.eos_token_id)
    logits = []
    for method in (Full(), destroyer):
        with attach(model), torch.no_grad():
            cache, mask = new_cache(model, method), inputs["attention_mask"]
            model(**inputs, past_key_values=cache, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
            steps = []
            for token in answer[:, :-1].split(1, dim=1):
                mask = torch.cat([mask, torch.ones_like(token)], dim=1)
                position = mask.sum(1, keepdim=True) - 1
                steps.append(model(input_ids=token, attention_mask=mask, past_key_values=cache, position_ids=position).logits[:, -1])
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
        evaluate(model, processor, rows, [Entry("segments", Full(), FULL)], 2, 2, Progress(disable=True))


# Equal bytes


def _prefills(visual: int, tokens: int) -> list[LayerPrefill]:
    """One row of random numbers with one image, for each layer."""
    valid, spans = torch.ones(1, tokens, dtype=torch.bool), [VisualSpan(0, 3, visual, (1, 1, visual))]
    drawn = [[rand(1, heads, tokens, 32, seed=9 * layer + i).float() for i, heads in enumerate((4, 2, 2))] for layer in range(LAYERS)]
    return [LayerPrefill(layer, *three, spans, valid, 32**-0.5) for layer, three in enumerate(drawn)]


def _weigher(visual: int, tokens: int) -> Callable[[Method], int]:
    prefills = _prefills(visual, tokens)

    def stored(method: Method) -> int:
        run = start(method, range(LAYERS))
        done = [compressed for of in prefills for _, compressed in run.add(of)]
        return storage_bytes(t for part in done for segments in part for s in segments for t in s.entry_tensors())

    return stored


@pytest.fixture(scope="module")
def weigh() -> Callable[[Method], int]:
    return _weigher(TOKENS, TOKENS + 24)


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_rivals_get_the_bytes_that_they_are_to_match(weigh, name: str, share: float) -> None:
    """Visual and text together, whatever the policy's dial is about."""
    target = int(share * weigh(Full()))
    found = match(target, partial(build, name, {}), weigh, LAYERS)
    assert abs(weigh(found) / target - 1) <= TOLERANCE


def _kept(method: Method) -> list[int]:
    """Visual tokens that each layer keeps of an image of 20."""
    return [sum(s.tokens for s in method.compress(of).visual) for of in _prefills(20, 30)]


SMALL = _weigher(20, 30)
TEXT_BYTES = LAYERS * (10 * TOKEN_BYTES + 8)
"""Ten text tokens in each layer, and the owner of their segment."""


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        # The first layers take what whole tokens leave.
        (10, [3, 3, 2, 2]),
        (40.3, [10, 10, 10, 10]),
        # 4.2 tokens over four layers, and 4 would be nearest; of all bytes it is 0.2 %.
        (4.2, [1, 1, 1, 1]),
        # Never less than one token, never more than all.
        (1, [1, 1, 1, 1]),
        (1000, [20, 20, 20, 20]),
    ],
)
def test_the_nearest_number_of_tokens(tokens: float, kept: list[int]) -> None:
    target = TEXT_BYTES + LAYERS * 8 + int(tokens * TOKEN_BYTES)
    assert _kept(match(target, EvenlySpaced, SMALL, LAYERS)) == kept


def test_where_bytes_cannot_be_equal_a_rival_gets_more() -> None:
    """Were there no text, 5.4 tokens would be 7 % from five: six are kept."""
    visual = LAYERS * 8 + int(5.4 * TOKEN_BYTES)
    assert _kept(match(visual, EvenlySpaced, lambda method: SMALL(method) - TEXT_BYTES, LAYERS)) == [2, 2, 1, 1]


def test_a_method_that_spreads_its_budget_is_not_mixed() -> None:
    pyramid = match(int(0.2 * SMALL(Full())) + TEXT_BYTES // 2, PyramidKV, SMALL, LAYERS)
    assert isinstance(pyramid, PyramidKV)
    assert isinstance(match(TEXT_BYTES + 10 * TOKEN_BYTES, EvenlySpaced, SMALL, LAYERS), PerLayer)


@pytest.mark.parametrize(("tokens", "least", "kept"), [(40, 0.3, 10), (8, 0.3, 6)])
def test_a_method_may_have_a_least_share(tokens: int, least: float, kept: int) -> None:
    """What it refuses is below all that it stores; what it refuses at 1 is an error."""

    def make(dial: float) -> Method:
        if dial < least:
            raise InputError("too little")
        return EvenlySpaced(dial)

    assert _kept(match(TEXT_BYTES + LAYERS * 8 + tokens * TOKEN_BYTES, make, SMALL, LAYERS)) == [kept] * LAYERS
    with pytest.raises(InputError, match="snapkv: window 0"):
        match(TEXT_BYTES, partial(build, "snapkv", {"window": 0}), SMALL, LAYERS)


def test_prompts_are_weighed_as_the_run_weighs_them(model, rows, tallies, make_capsule, processor) -> None:
    """Visual and text, of two batches of two."""
    assert prompt_bytes(model, list(batches(rows, model, processor, 2)), make_capsule(0.2)) == tallies["noise"].total


# Methods


def test_rows_are_named_after_the_family_unless_that_is_ambiguous(tmp_path, make_capsule) -> None:
    for name in ("a", "b"):
        make_capsule(0.2).save_pretrained(tmp_path / name)
    make_capsule(1, "identity").save_pretrained(tmp_path / "c")
    assert list(open_capsules([str(tmp_path / "a"), str(tmp_path / "c")])) == ["kvcapsule", "identity"]
    assert list(open_capsules([str(tmp_path / "a"), str(tmp_path / "b")])) == ["kvcapsule:a", "kvcapsule:b"]


def test_chosen_methods() -> None:
    assert chosen([], ["kvcapsule"]) == ["kvcapsule", "post-vision-attention", "evenly-spaced", "int4"]
    assert chosen(["int4", "full", "kvcapsule"], ["kvcapsule"]) == ["kvcapsule", "int4"]
    assert chosen(["int2", "int3", "int8"], ["kvcapsule"]) == ["int8", "int3", "int2"]
    assert chosen(["full"], ["kvcapsule"]) == []


def test_settings_of_the_entries(make_capsule) -> None:
    """A policy's are its fields; a list where layers differ."""
    named = {"kvcapsule": ("some/capsule", make_capsule(0.2))}

    def turned(name: str) -> Method:
        return PerLayer([build(name, {}, dial) for dial in (0.2, 0.2, 0.1, 0.1)]) if name == "evenly-spaced" else build(name, {}, 0.2)

    found = entries(["kvcapsule", "evenly-spaced", "snapkv", "int4", "kivi4"], named, turned, "kvcapsule")
    assert [entry.family for entry in found] == ["full", "kvcapsule", *["token-pruning"] * 2, *["quantisation"] * 2]
    made = {entry.name: entry.settings for entry in found}
    assert made[FULL] == {}
    assert made["kvcapsule"]["capsule"] == "some/capsule" and made["kvcapsule"]["key_ratios"] == 0.2
    assert made["evenly-spaced"] == {"policy": "evenly-spaced", "ratio": [0.2, 0.2, 0.1, 0.1], "matched_to": "kvcapsule"}
    snapkv = {"policy": "snapkv", "ratio": 0.2, "window": 32, "kernel": 7, "pooling": "avg", "matched_to": "kvcapsule"}
    assert made["snapkv"] == snapkv
    assert made["int4"] == {"policy": "quantized", "bits": 4}
    assert made["kivi4"] == {"policy": "kivi", "bits": 4, "group": 32}


def test_every_policy_can_be_named() -> None:
    """By its registration alone; `full` is the row of the full cache, and `quantized` has a row for each width."""
    assert set(POLICIES) - {*RIVALS, *FIXED} == {"full", "quantized"}
    assert {"text-pruning", "quantized-text"} <= set(TEXT)
    assert not {"snapkv", "full", "quantized", "look-m"} & set(TEXT), "what keeps all text raw, or stores it with the image"


@pytest.mark.parametrize(
    ("name", "settings", "dial", "complaint"),
    [
        ("snapkv", {"windw": 3}, 0.1, "snapkv has no setting 'windw'; it has window, kernel, pooling."),
        ("snapkv", {"ratio": 0.2}, 0.1, "snapkv has no setting 'ratio'"),
        ("snapkv", {"window": 0}, 0.1, "snapkv: window 0"),
        ("snapkv", {"window": "wide"}, 0.1, "snapkv: "),
        ("full", {"bits": 3}, None, "it has none"),
        ("quantized", {}, None, "quantized: "),
    ],
)
def test_wrong_settings(name: str, settings: dict[str, Any], dial: float | None, complaint: str) -> None:
    with pytest.raises(InputError, match=re.escape(complaint)):
        build(name, settings, dial)


def test_reports_show_no_places(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown_path(str(tmp_path / "runs" / "demo")) == "runs/demo"
    assert shown_path("/home/somebody/demo") == "demo"
    assert shown_path("org/name") == "org/name"
    shown = command_line(command.PROG, ["--capsule", "/home/somebody/demo", "--json=/home/somebody/x.json", "--data.size", "3"])
    assert shown == "kvcapsule eval --capsule demo --json=x.json --data.size 3"


# Timing, picture, files


def test_timing_is_relative_to_the_full_cache(model, processor, rows) -> None:
    compared = [full_entry(), Entry("segments", Full(), FULL)]
    timed = time_entries(model, processor, rows, compared, 2, Progress(disable=True), rounds=1, steps=2)
    assert timed[FULL] == (1.0, 1.0)
    assert all(0 < ratio < 100 for ratio in timed["segments"])


class Late:
    """A clock that can be put forward, in place of time that passes."""

    def __init__(self) -> None:
        self.by = 0.0

    def __call__(self) -> float:
        return perf_counter() + self.by


class SlowPrefill(Full):
    def __init__(self, clock: Late) -> None:
        self.clock = clock

    def compress(self, prefill: LayerPrefill) -> Compressed:
        self.clock.by += 10.0
        return super().compress(prefill)


class SlowRows(QuantizedRows):
    clock: Late

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        self.clock.by += 10.0
        return super().read(dtype)


class SlowDecode(Full):
    def __init__(self, clock: Late) -> None:
        SlowRows.clock = clock

    def compress_visual(self, prefill: LayerPrefill, text: list[Segment]) -> Compressed:
        (segment,), text = super().compress_visual(prefill, text)
        return Compressed([replace(segment, keys=SlowRows.pack(segment.keys, 8))], text)


@pytest.mark.parametrize("slow", [SlowPrefill, SlowDecode])
def test_prefill_and_decode_are_timed_apart(model, processor, rows, monkeypatch, slow) -> None:
    clock = Late()
    monkeypatch.setattr(timing, "perf_counter", clock)
    compared = [full_entry(), Entry("slow", slow(clock), FULL)]
    timed = time_entries(model, processor, rows, compared, 2, Progress(disable=True), rounds=1, steps=2)["slow"]
    assert (timed.prefill_ratio > 10) == (slow is SlowPrefill)
    assert (timed.tokens_per_s_ratio < 0.1) == (slow is SlowDecode)


def _row(method: str, size: int, score: float) -> dict[str, Any]:
    return {"method": method, "visual_kv_bytes": size, "accuracy": {"a": score, "b": score}, "compression": 400_000 / size}


CROWDED = [
    _row("full", 400_000, 0.9),
    _row("kvcapsule:ten", 40_000, 0.9),
    _row("kvcapsule:five", 80_000, 0.9),
    _row("post-vision-attention", 40_100, 0.9),
    _row("evenly-spaced", 40_100, 0.9),
    _row("int4", 54_000, 0.9),
    _row("kvcapsule:one-with-a-name-that-is-long", 400_000, 0.4),
]


def test_labels_cover_neither_each_other_nor_a_dot() -> None:
    figure = picture(CROWDED, "crowded")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    labels = [text for text in axes.texts if text.get_text()]
    assert {label.get_text().split(" (")[0] for label in labels} == {row["method"] for row in CROWDED}
    # Of the words alone: an annotation's own extent holds its line to the dot too.
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    dots = [axes.transData.transform((row["visual_kv_bytes"], row["accuracy"]["a"])) for row in CROWDED]
    assert not any(box.contains(*dot) for box in boxes for dot in dots)
    assert all(figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1) for box in boxes)


def test_capsules_and_quantisation_look_different() -> None:
    (axes,) = picture([_row("kvcapsule", 80_000, 0.9), _row("int4", 60_000, 0.9), _row("int3", 50_000, 0.9)], "title").axes
    capsule, int4, int3 = (line.get_color() for line in axes.lines)
    assert int4 == int3 != capsule


@pytest.mark.parametrize(("suffix", "begins"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_picture_in_the_format_of_its_name(tmp_path, suffix: str, begins: bytes) -> None:
    draw(picture(CROWDED, "title"), tmp_path / "new" / f"picture{suffix}")
    assert (tmp_path / "new" / f"picture{suffix}").read_bytes().startswith(begins)
    assert len(list((tmp_path / "new").iterdir())) == 1


def test_json_is_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "result.json"
    write_whole(path, to_json({"a": 1}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_whole(path, to_json({"a": float("nan")}))
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# The command

QUICK = ("--data.size", "4", "--batch", "4", "--max-new-tokens", "4", "--timing", "false")


def test_command_writes_what_it_was_asked_for(vlm, capsule_folder, tmp_path, capsys) -> None:
    files = ["--json", str(tmp_path / "out" / "eval.json"), "--plot", str(tmp_path / "out" / "eval.png"), "--save-metrics", "true"]
    assert main(["--model", vlm, "--capsule", str(capsule_folder), *QUICK, *files]) == 0
    result = json.loads((tmp_path / "out" / "eval.json").read_text())
    by_name = {row["method"]: row for row in result["rows"]}
    assert list(by_name) == ["full", "kvcapsule", "post-vision-attention", "evenly-spaced", "int4"]
    assert list(by_name["full"]["accuracy"]) == list(pages.TASKS)
    for name in ("post-vision-attention", "evenly-spaced"):
        for key in ("kv_bytes", "visual_kv_bytes"):
            assert by_name[name][key] == pytest.approx(by_name["kvcapsule"][key], rel=TOLERANCE)
    assert 4 < by_name["kvcapsule"]["compression"] < 5 and 7 < by_name["int4"]["compression"] < 8
    with Image.open(tmp_path / "out" / "eval.png") as drawn:
        assert drawn.size[0] > 1000
    metrics = json.loads((capsule_folder / "metrics.json").read_text())
    assert metrics == {"train": {"loss": 0.5}, "eval": result}
    assert "post-vision-attention" in (capsule_folder / "README.md").read_text()
    printed = capsys.readouterr()
    assert all(name in printed.out for name in by_name)
    assert "answers" in printed.err
    # The model has float32: the other compression is shown beside it.
    assert "of 16-bit" in printed.out


def test_command_takes_the_widths_that_are_not_there_by_default(vlm, tmp_path) -> None:
    arguments = ["--methods", "int8", "--methods", "int3", "--methods", "int2", "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    _, int8, int3, int2 = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["settings"]["bits"] for row in (int8, int3, int2)] == [8, 3, 2]
    assert int8["visual_kv_bytes"] > int3["visual_kv_bytes"] > int2["visual_kv_bytes"]
    assert int8["kl"] < int3["kl"] < int2["kl"]


def test_command_without_a_capsule_by_a_file_of_options(vlm, tmp_path) -> None:
    (tmp_path / "suite.yaml").write_text("ratio: 0.5\nmethods: [evenly-spaced]\n")
    arguments = ["--config", str(tmp_path / "suite.yaml"), "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    full, spaced = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert (full["method"], spaced["method"]) == ("full", "evenly-spaced")
    assert spaced["settings"] == {"policy": "evenly-spaced", "ratio": 0.5}
    assert spaced["compression"] == pytest.approx(2.0, rel=0.01)


def test_command_takes_several_capsules(vlm, capsule_folder, tmp_path, make_capsule) -> None:
    make_capsule(0.1).save_pretrained(tmp_path / "tenth")
    arguments = ["--capsule", str(tmp_path / "tenth"), "--capsule", str(capsule_folder), "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    by_name = {row["method"]: row for row in json.loads((tmp_path / "eval.json").read_text())["rows"]}
    assert by_name["kvcapsule:tenth"]["compression"] > 1.8 * by_name["kvcapsule:fifth"]["compression"]
    assert by_name["evenly-spaced"]["settings"]["matched_to"] == "kvcapsule:tenth"
    assert by_name["evenly-spaced"]["kv_bytes"] == pytest.approx(by_name["kvcapsule:tenth"]["kv_bytes"], rel=TOLERANCE)


def test_a_budget_is_each_methods_own(vlm, tmp_path) -> None:
    """Of the visual tokens (196 of about 215), or of all; methods with commas, in the order of the registry."""
    arguments = ["--methods", "look-m,snapkv", "--methods=int4", "--budget", "0.25", "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    full, snapkv, look, int4 = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["method"] for row in (snapkv, look, int4)] == ["snapkv", "look-m", "int4"]
    assert snapkv["settings"]["ratio"] == look["settings"]["budget"] == 0.25
    assert snapkv["compression"] == pytest.approx(4, rel=0.01)
    assert look["kv_bytes"] < 0.27 * full["kv_bytes"] < snapkv["kv_bytes"]


def test_lists_of_the_command_line_replace_those_of_a_file(tmp_path) -> None:
    (tmp_path / "options.yaml").write_text("ratio: 0.5\nmethods: [evenly-spaced, int4]\n")
    options = ["--config", str(tmp_path / "options.yaml")]
    parse = lambda *words: command._parse(command._normal([*options, *words]))  # noqa: E731
    assert parse().methods == ["evenly-spaced", "int4"]
    assert parse("--methods", "int8", "--batch", "3", "--methods=int3,h2o").methods == ["int8", "int3", "h2o"]
    assert command._parse(command._normal(["--capsule", "a,b", "--capsule", "c"])).capsule == ["a,b", "c"]


@pytest.fixture
def questions_file(tmp_path, images) -> Callable[..., str]:
    """questions_file(answer="x"): a .jsonl of two questions about one page, with these columns beside image and prompt."""

    def build(image: str | None = None, **columns: Any) -> str:
        images[0].save(tmp_path / "page.png")
        row = {"image": image or str(tmp_path / "page.png"), "prompt": "What?", **columns}
        (tmp_path / "own.jsonl").write_text(2 * (json.dumps(row) + "\n"))
        return str(tmp_path / "own.jsonl")

    return build


def test_own_data_without_tasks(vlm, questions_file, tmp_path) -> None:
    source = questions_file(answer="x")
    arguments = ["--data.source", source, "--ratio", "0.5", "--methods", "int4", "--json", str(tmp_path / "eval.json")]
    assert main(["--model", vlm, *QUICK, *arguments]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert [(row["accuracy"], row["n"]) for row in result["rows"]] == [({"own": 0.0}, 2)] * 2
    assert str(tmp_path) not in json.dumps(result)


def _refused(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    printed = capsys.readouterr()
    complaint = printed.err.strip().splitlines()[-1]
    assert complaint.startswith("kvcapsule eval: ") and "Traceback" not in printed.err
    assert printed.out == ""
    return complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--ratio", "0"), "outside (0, 1]"),
        (("--ratio", "10"), "outside (0, 1]"),
        (("--ratio", "0.5", "--capsule", "x"), "--ratio is for runs without a capsule"),
        (("--budget", "2"), "--budget 2.0 is outside (0, 1]"),
        (("--budget", "0.5", "--capsule", "x"), "--budget is for runs without a capsule"),
        (("--budget", "0.5", "--ratio", "0.5"), "leave one out"),
        (("--methods",), "--methods"),
        (("--ratio", "0.5", "--methods", "inf4"), "there is no method 'inf4'; this run has full, post-vision-attention"),
        ((), "give a --capsule"),
        (("--capsule", "/no/such/capsule"), "/no/such/capsule"),
        (("--ratio", "0.5", "--model", "/no/such/model"), "cannot load"),
        (("--ratio", "0.5", "--max-new-tokens", "1"), "at least 2"),
        (("--ratio", "0.5", "--batch", "0"), "--batch 0"),
        (("--ratio", "0.5", "--batch", "many"), "many"),
        (("--ratio", "0.5", "--plot", "x.bmp"), ".png, .svg, .pdf"),
        (("--ratio", "0.5", "--json", "/dev/null/x.json"), "cannot be written"),
        (("--ratio", "0.5", "--device", "abacus"), "--device abacus"),
        (("--ratio", "0.5", "--save-metrics", "true"), "exactly one --capsule"),
        (("--rato", "0.5"), "rato"),
    ],
)
def test_wrong_arguments(capsys, arguments: tuple[str, ...], complaint: str) -> None:
    assert complaint in _refused(capsys, *arguments)


def test_wrong_data(vlm, questions_file, capsys, tmp_path) -> None:
    run = ("--model", vlm, "--ratio", "0.5")
    assert "at least one question" in _refused(capsys, *run, "--data.size", "0")
    assert "no split 'exam'" in _refused(capsys, *run, "--data.split", "exam")
    assert "no column 'answer'" in _refused(capsys, *run, "--data.source", questions_file(label="x"))
    assert "answer" in _refused(capsys, *run, "--data.source", questions_file(answer=["x", "y"]))
    (tmp_path / "broken.png").write_text("this is no image")
    assert "row 0" in _refused(capsys, *run, "--data.source", questions_file(str(tmp_path / "broken.png"), answer="x"))
    assert "row 0" in _refused(capsys, *run, "--data.source", questions_file(str(tmp_path / "lost.png"), answer="x"))
    (tmp_path / "empty.csv").write_text("image,prompt,answer\n")
    assert "empty.csv" in _refused(capsys, *run, "--data.source", str(tmp_path / "empty.csv"))


def test_no_questions(vlm, rows, capsys, monkeypatch) -> None:
    monkeypatch.setattr(compare.source, "load", lambda _: rows.select([]))
    assert "holds no questions" in _refused(capsys, "--model", vlm, "--ratio", "0.5")


def test_capsule_of_another_model(vlm, tmp_path, geometry, capsys) -> None:
    other = KVGeometry.from_dict({**geometry.to_dict(), "kv_heads": 4})
    Capsule(CapsuleConfig("identity", IdentityConfig(14), other, "other")).save_pretrained(tmp_path / "other")
    assert "kv_heads: 4 != 2" in _refused(capsys, "--model", vlm, "--capsule", str(tmp_path / "other"))


def test_damaged_metrics_are_not_replaced(vlm, tmp_path, make_capsule, capsys) -> None:
    make_capsule(0.2).save_pretrained(tmp_path / "capsule")
    metrics = tmp_path / "capsule" / "metrics.json"
    metrics.write_text("{")
    assert main(["--model", vlm, "--capsule", str(tmp_path / "capsule"), "--methods", "full", *QUICK, "--save-metrics", "true"]) == 2
    assert "damaged" in capsys.readouterr().err
    assert metrics.read_text() == "{"


def test_a_defect_is_not_taken_for_wrong_input(monkeypatch) -> None:
    monkeypatch.setattr(command, "run", lambda *_: torch.empty(2).view(3))
    with pytest.raises(RuntimeError):
        main(["--ratio", "0.5"])
    monkeypatch.setattr(command, "run", lambda *_: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting"):
        main(["--ratio", "0.5"])


def test_help_explains_every_option(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in command.EvalConfig.__dataclass_fields__:
        assert f"--{name}" in printed
    assert "Most tokens of an answer, the end token included." in printed

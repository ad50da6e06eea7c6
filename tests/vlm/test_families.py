"""Every row of kvcapsule.vlm.families: a tiny model of the family's own class answers from capsules as it does from the
full cache."""

import functools
import json
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support import tiny_vlm
from support.builders import kv_capsule, transform_capsule
from support.family_models import CASES, EXACT, NEW, OPTIONS, TILE, Built, Witness, assert_same, built
from support.tiny_families import BUILDERS, REFUSED
from support.tiny_vlm import Picture
from transformers import AutoConfig, BatchFeature, DynamicCache

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.cli import main
from kvcapsule.errors import GeometryError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.cache_layer import CapsuleLayer
from kvcapsule.inference.transformers_api import ENCODES_IMAGES, cache_argument
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.methods.method import Method
from kvcapsule.methods.tiles import cut_tiles
from kvcapsule.policy import EvenlySpaced, Full
from kvcapsule.segments.segment import Segment
from kvcapsule.vlm.families import FAMILIES, TRANSFORMERS
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.spans import VisualSpan


@functools.cache
def expected(index: int) -> Any:
    """The model's own answer to `prompts`."""
    one = built(index)
    return one.model.generate(**tiny_vlm.batch(one.tiny, *one.prompts), **OPTIONS)


pytestmark = pytest.mark.usefixtures("one_thread")


NAMES = [f"{case.family.name}:{case.model_type}" for case in CASES]


@pytest.fixture(params=range(len(CASES)), ids=NAMES)
def index(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def one(index: int) -> Built:
    return built(index)


def answer(one: Built, method: Method, rows: Sequence[Sequence[Any]]) -> Any:
    with attach(one.model, method):
        return one.model.generate(**tiny_vlm.batch(one.tiny, *rows), **OPTIONS)


class TestTable:
    """What `kvcapsule models` says of a family is so."""

    def test_a_builder_for_every_row_and_a_row_for_every_builder(self) -> None:
        assert [family.name for family in FAMILIES if family.status == "works"] == list(BUILDERS)
        assert [family.name for family in FAMILIES if family.status == "refused"] == list(REFUSED)

    def test_versions_are_those_of_the_project(self) -> None:
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        assert f"transformers{TRANSFORMERS}" in project["dependencies"]

    def test_class_positions_and_spans(self, one: Built) -> None:
        family = one.case.family
        assert type(one.model).__name__ == one.case.class_name
        assert one.model.config.model_type == one.case.model_type
        assert one.geometry.rotary == family.positions
        assert (len(one.tiny.picture(0).spans) == 1) == (family.span == "image")
        assert (one.tiny.video is not None) == bool(family.video)
        if one.tiny.video is not None:
            assert (len(one.tiny.video(0).spans) == 1) == (family.video == "video")

    def test_capsules_are_in_the_full_attention_layers_alone(self, one: Built) -> None:
        own = [type(layer) for layer in DynamicCache(config=one.model.config).layers]
        layers = CapsuleCache(one.model.config, Full()).layers
        assert any(isinstance(layer, CapsuleLayer) for layer in layers)
        kept = [(ours, theirs) for ours, theirs in zip(layers, own, strict=True) if not isinstance(ours, CapsuleLayer)]
        assert bool(kept) == ("the model's own" in one.case.family.note)
        assert all(type(ours) is theirs for ours, theirs in kept)

    @pytest.mark.parametrize("name", REFUSED)
    def test_refused(self, name: str) -> None:
        (family,) = (family for family in FAMILIES if family.name == name)
        for model_type, settings in zip(family.model_types, REFUSED[name], strict=True):
            config = AutoConfig.for_model(model_type, **settings())
            for attempt in (lambda: KVGeometry.from_config(config), lambda: CapsuleCache(config, Full())):  # noqa: B023
                with pytest.raises(GeometryError, match=f"{model_type}.*{re.escape(family.note)}"):
                    attempt()


def spans_seen(one: Built, way: str, batch: BatchFeature) -> Sequence[VisualSpan]:
    """The spans that a method is given, in generate or in a direct forward."""
    witness = Witness()
    with attach(one.model, witness):
        if way == "generate":
            one.model.generate(**batch, **OPTIONS)
        else:
            one.model(**batch, **cache_argument(CapsuleCache(one.model.config, witness)))
    return witness.seen[0].spans


def loses_count_of_frames(one: Built) -> bool:
    """In a direct forward, with any cache, transformers 5.19 to 5.22 lose the count of frames that Gemma 4 asks for."""
    if one.case.family.name != "Gemma 4":
        return False
    try:
        one.model(**tiny_vlm.batch(one.tiny, *one.film))
    except ValueError as error:
        assert "`num_frames_per_video` is required" in str(error)
        return True
    return False


class TestSpans:
    """Every picture's placeholders, and no others, with its images apart."""

    @pytest.mark.parametrize("way", ["generate", "forward"])
    def test_lengths_and_places(self, way: str, one: Built) -> None:
        lost = way == "forward" and loses_count_of_frames(one)
        for rows in (one.prompts, one.film) if one.tiny.video and not lost else (one.prompts,):
            batch = tiny_vlm.batch(one.tiny, *rows)
            spans = spans_seen(one, way, batch)
            assert [s.length for s in spans] == [
                n for row in rows for part in row if isinstance(part, Picture) for n in part.spans
            ]
            ids, marked = batch["input_ids"], torch.zeros_like(batch["input_ids"])
            for span in spans:
                assert span.grid[0] * span.grid[1] * span.grid[2] == span.length
                marked[span.row, span.start : span.start + span.length] += 1
            assert torch.equal(marked, ((ids == tiny_vlm.IMAGE) | (ids == tiny_vlm.VIDEO)).long())

    @pytest.mark.parametrize("way", ["generate", "forward"])
    @pytest.mark.parametrize(
        "index",
        [i for i, case in enumerate(CASES) if "_" in case.family.span_boundary],
        ids=lambda i: NAMES[i],
        indirect=True,
    )
    def test_images_of_one_size_side_by_side(self, way: str, one: Built) -> None:
        """Where nothing but the images' number tells them apart."""
        pair = [one.tiny.picture(i)._replace(tokens=[tiny_vlm.IMAGE] * sum(one.tiny.picture(i).spans)) for i in (1, 3)]
        spans = spans_seen(one, way, tiny_vlm.batch(one.tiny, [5, *pair, 6], [3, 4]))
        assert [span.length for span in spans] == pair[0].spans + pair[1].spans


class TestFrames:
    """Canonical frames undo what the model did to the keys, whatever its way of rotating."""

    @pytest.mark.parametrize(
        "index",
        [i for i, case in enumerate(CASES) if "own" not in case.family.note],
        ids=lambda i: NAMES[i],
        indirect=True,
    )
    def test_an_image_further_on(self, one: Built) -> None:
        """The first layer's keys of an image depend on its place by their rotation alone."""
        image, found = one.tiny.picture(1), []
        for rows in ([5, image, 7], [5, 3, 4, 9, 8, 2, 6, image, 7]):
            witness = Witness()
            with attach(one.model, witness):
                one.model.generate(**tiny_vlm.batch(one.tiny, rows), **OPTIONS)
            tiles = cut_tiles(witness.seen[0], 4)
            assert tiles is not None and tiles.frame is not None
            found.append((tiles.keys, tiles.frame.unrotate(tiles.keys)))
        (keys, back), (further, further_back) = found
        torch.testing.assert_close(further_back, back, rtol=0, atol=EXACT)
        assert not torch.allclose(further, keys, atol=1e-2)

    @pytest.mark.parametrize(
        "index",
        [i for i, case in enumerate(CASES) if case.family.positions == "none"],
        ids=lambda i: NAMES[i],
        indirect=True,
    )
    def test_no_frame_for_keys_that_are_not_rotated(self, one: Built) -> None:
        witness = Witness()
        with attach(one.model, witness):
            one.model.generate(**tiny_vlm.batch(one.tiny, *one.prompts), **OPTIONS)
        assert all(prefill.position_embeddings is None for prefill in witness.seen)


class TestFullCache:
    """An identity capsule gives the full cache's tokens and logits."""

    @pytest.mark.parametrize("tile", [TILE, 5])
    def test_images(self, tile: int, one: Built, index: int) -> None:
        assert_same(answer(one, one.identity(tile), one.prompts), expected(index))

    @pytest.mark.parametrize(
        "index", [i for i, case in enumerate(CASES) if case.family.video], ids=lambda i: NAMES[i], indirect=True
    )
    def test_video(self, one: Built) -> None:
        batch = tiny_vlm.batch(one.tiny, *one.film)
        assert_same(answer(one, one.identity(5), one.film), one.model.generate(**batch, **OPTIONS))

    def test_the_images_are_read(self, one: Built, index: int) -> None:
        """Or the tests here would hold for any cache."""
        out = answer(one, EvenlySpaced(0.05), one.prompts)
        assert torch.equal(out.logits[0], expected(index).logits[0])
        changed = (out.logits[1] - expected(index).logits[1]).abs().amax(dim=1)
        assert (changed[:2] > 1e-2).all() and changed[2] < EXACT

    def test_rows_alone(self, one: Built, index: int) -> None:
        """Left padding changes nothing but the model's own rounding."""
        for row, prompt in enumerate(one.prompts):
            alone = answer(one, one.identity(), [prompt])
            for ours, theirs in zip(alone.logits, expected(index).logits, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=5 * EXACT)


LOSSY = {
    "kvcapsule": lambda geometry: kv_capsule(geometry, 0.25, 0.25, TILE),
    "transform": lambda geometry: transform_capsule(geometry, TILE, keys=(8, 4), values=(8, 4)),
}


@pytest.fixture(params=LOSSY)
def lossy(request: pytest.FixtureRequest, one: Built) -> Capsule:
    return LOSSY[request.param](one.geometry)


def segments_of(one: Built, method: Method, rows: Sequence[Sequence[Any]]) -> tuple[CapsuleCache, Any]:
    cache = CapsuleCache(one.model.config, method)
    with attach(one.model):
        out = one.model.generate(**tiny_vlm.batch(one.tiny, *rows), **cache_argument(cache), **OPTIONS)
    return cache, out


def rebuilt(segment: Segment) -> list[torch.Tensor]:
    keys, values = segment.materialize()
    return [torch.cat([key, value], dim=-1) for key, value in zip(keys, values, strict=True)]


class TestCompressed:
    """Codecs that lose something, their parameters drawn at random."""

    def test_fewer_bytes(self, lossy: Capsule, one: Built) -> None:
        full, _ = segments_of(one, one.identity(), one.prompts)
        cache, out = segments_of(one, lossy, one.prompts)
        assert cache.bytes().visual < 0.75 * full.bytes().visual
        assert cache.bytes().text == full.bytes().text
        assert cache.bytes().other == full.bytes().other
        assert all(bool(logits.isfinite().all()) for logits in out.logits)
        assert cache.get_seq_length() == full.get_seq_length()

    def test_two_images_as_each_alone(self, lossy: Capsule, one: Built) -> None:
        witness = Witness()
        segments_of(one, witness, one.prompts[:1])
        prefill = witness.seen[0]
        assert len(prefill.spans) > 1
        together = [entry for segment in lossy.compress(prefill).visual for entry in rebuilt(segment)]
        apart = []
        for span in prefill.spans:
            only = LayerPrefill(**{**vars(prefill), "spans": [span], "shared": {}})
            apart += [entry for segment in lossy.compress(only).visual for entry in rebuilt(segment)]
        assert sum(entry.shape[1] for entry in together) == sum(entry.shape[1] for entry in apart)
        tiles = [[entry for entry in entries if entry.shape[1] == TILE] for entries in (together, apart)]
        assert len(tiles[0]) == len(tiles[1]) > 1
        for ours, theirs in zip(*tiles, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)
        assert not torch.allclose(tiles[0][0], tiles[0][-1], atol=1e-2)

    def test_rows_alone(self, lossy: Capsule, one: Built) -> None:
        together = answer(one, lossy, one.prompts)
        for row, prompt in enumerate(one.prompts):
            alone = answer(one, lossy, [prompt])
            for ours, theirs in zip(alone.logits, together.logits, strict=True):
                torch.testing.assert_close(ours[0], theirs[row], rtol=0, atol=1e-4)


class Talk(NamedTuple):
    """Three turns: an image, a new image, no image."""

    outputs: list[Any]
    positions: list[torch.Tensor]
    """Position ids that the language part was given, at every step."""


def converse(one: Built, cache: Any) -> Talk:
    """New images are handed over as features, the grids of all: what transformers takes for every family, whatever its
    positions. Before 5.18 new images were handed over as pixels, which families with grids and those of Gemma failed
    on with any cache."""
    tiny, model, positions, outputs = one.tiny, one.model, [], []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        positions.append(kwargs["position_ids"].clone())

    said: list[Any] = []
    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        for asked in ([5, 6, tiny.picture(0), 7], [8, tiny.picture(1), 9, 4], [3, 2, 1]):
            said += asked
            pictures = [part for part in said if isinstance(part, Picture)]
            inputs = {
                k: v
                for k, v in tiny_vlm.batch(tiny, said).items()
                if k not in pictures[0].inputs or k == "image_grid_thw"
            }
            new = [part for part in asked if isinstance(part, Picture)]
            if new and not ENCODES_IMAGES:
                inputs |= tiny.join([new]) if tiny.join else tiny_vlm.joined(new)
            elif new:
                pixels = tiny.join([new]) if tiny.join else tiny_vlm.joined(new)
                inputs["mm_encoder_outputs"] = {"image": model.model.get_image_features(**pixels, return_dict=True)}
            out = model.generate(**inputs, **cache_argument(cache), **OPTIONS)
            said += out.sequences[0, -NEW:].tolist()
            outputs.append(out)
    finally:
        handle.remove()
    return Talk(outputs, positions)


class TestThreeTurns:
    def test_positions_and_logits(self, one: Built) -> None:
        if not ENCODES_IMAGES and (
            one.case.family.span_boundary == "grids" or one.case.family.name.startswith("Gemma")
        ):
            pytest.skip(f"{one.case.family.name} takes a new image in a later turn from transformers 5.18 on")
        own = converse(one, DynamicCache(config=one.model.config))
        assert len(own.positions) == 3 * NEW
        methods = {"identity": one.identity(5), "kvcapsule": LOSSY["kvcapsule"](one.geometry), "full": Full()}
        for name, method in methods.items():
            with attach(one.model):
                cache = CapsuleCache(one.model.config, method)
                talk = converse(one, cache)
            assert len(talk.positions) == len(own.positions)
            for step, (ours, theirs) in enumerate(zip(talk.positions, own.positions, strict=True)):
                assert torch.equal(ours, theirs), (name, step)
            if name != "kvcapsule":
                for out, wanted in zip(talk.outputs, own.outputs, strict=True):
                    assert_same(out, wanted)
        if one.case.family.positions.startswith("mrope"):
            stored = cache.get_seq_length()
            assert own.positions[-1].max() < stored - 1, (
                "an image advances M-RoPE by fewer positions than it has tokens"
            )


class TestCommand:
    def test_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "--json", "-"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["name"] for row in rows] == [family.name for family in FAMILIES]
        for row, family in zip(rows, FAMILIES, strict=True):
            assert row["model_types"] == list(family.model_types) and row["transformers"] == TRANSFORMERS
            assert row.keys() == {*vars(family), "transformers"}

    def test_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["models", "--wide"]) == 0
        printed = capsys.readouterr().out
        for family in FAMILIES:
            assert family.name in printed
            assert all(name in printed for name in family.classes)
        page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
        assert "\n".join(line.rstrip() for line in printed.strip("\n").splitlines()) in page

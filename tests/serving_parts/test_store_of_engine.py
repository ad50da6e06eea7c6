"""What the scheduler's half gets from an image store, and gives to it: no vLLM is needed."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.builders import GEOMETRY, transform_capsule
from support.stored_spans import stored_span

from kvcapsule.capsule.stored_span import to_bytes
from kvcapsule.serving.known_images import KnownImages
from kvcapsule.serving.model_files import ModelFiles, files_digest
from kvcapsule.serving.prompt_images import PromptImage, plain_bytes, prompt_images
from kvcapsule.serving.scheduler_half import SchedulerHalf
from kvcapsule.store.entry import StoreKey
from kvcapsule.store.image_store import ImageStore

BLOCK = 32
PLACES = [(1, 196), (210, 196)]
RUNS = (5, 5)


@pytest.fixture
def half() -> SchedulerHalf:
    return SchedulerHalf(block=BLOCK, tile=BLOCK, slots=12)


def images(places: Sequence[tuple[int, int]] = PLACES) -> list[PromptImage]:
    keys = [StoreKey.of({"end": start + length}) for start, length in places]
    return prompt_images(places, keys, BLOCK, BLOCK)


def begin(half: SchedulerHalf, name: str, data: list[bytes], tokens: range = range(430)) -> int:
    loaded = half.plan(name, PLACES, images(), data, tokens)
    half.begin(name, PLACES, loaded)
    return loaded


def test_images_of_a_prompt() -> None:
    first, second, small = images([*PLACES, (410, 20)])
    assert (first.text, first.first, first.end) == (1, 0, 197)
    assert (second.text, second.first, second.end) == (13, 197, 406)
    assert first.raw(BLOCK) == [*range(1, 32), *range(192, 197)]
    assert small.run is None and small.raw(BLOCK) == list(range(410, 430)) and small.text == 4


def test_each_image_is_saved_in_the_step_that_ends_with_it(half: SchedulerHalf) -> None:
    assert begin(half, "a", []) == 0
    assert half.step({"a": 100}).save == []
    (save,) = half.step({"a": 197}).save
    assert save.image.end == 197 and list(save.slots) == half.requests["a"].slots
    (save,) = half.step({"a": 406}).save
    assert save.image.end == 406 and list(save.slots) == half.requests["a"].slots[5:]
    assert half.step({"a": 430}).save == []


def test_images_that_were_not_computed_behind_a_capsule_alone_are_not_saved(half: SchedulerHalf) -> None:
    begin(half, "a", [])
    assert half.step({"a": 200}).save == [] and half.step({"a": 406}).save == []
    half.end("a")
    half.slots.take(3)
    begin(half, "b", [])
    assert len(half.step({"b": 197}).save) == 1
    assert half.step({"b": 406}).save == [] and half.refused == 1


def test_images_that_are_in_doubt_by_then_are_not_saved(half: SchedulerHalf) -> None:
    doubtful: set[str] = set()
    half.trusts = lambda request: request not in doubtful
    begin(half, "a", [])
    assert len(half.step({"a": 197}).save) == 1
    # Another request came with other values under the hash of one of its images.
    doubtful.add("a")
    assert half.step({"a": 406}).save == []
    doubtful.clear()
    assert half.step({"a": 430}).save == [] and half.requests["a"].unsaved == []


def test_known_images_take_slots_and_are_not_computed(half: SchedulerHalf) -> None:
    assert half.plan("a", PLACES, images(), [b"one", b"two"], range(430)) == 406
    assert half.slots.used == 0 and [run.tiles for run in half.loading("a")] == list(RUNS)
    assert half.exact_tokens("a") == 0
    # Asked again, as the first time no block was free.
    assert half.plan("a", PLACES, images(), [b"one", b"two"], range(430)) == 406
    half.begin("a", PLACES, 406)
    assert half.slots.used == 10 and half.loading("a") == () and half.exact_tokens("a") == 0
    step = half.step({"a": 430})
    (load,) = step.load
    assert list(load.data) == [b"one", b"two"] and load.first == 0 and len(load.slots) == 10
    assert step.compress == [] and step.save == [] and half.step({"a": 431}).load == []
    assert [run.end for run in half.compressed("a")] == [197, 406]
    half.end("a")
    assert half.slots.used == 0 and half.step({}).forget == ["a"]


def test_the_rest_of_a_chain_is_computed_and_saved(half: SchedulerHalf) -> None:
    assert begin(half, "a", [b"one"]) == 197
    step = half.step({"a": 406})
    assert len(step.load) == len(step.compress) == len(step.save) == 1
    assert step.save[0].image.end == 406 and half.slots.used == 10


@pytest.mark.parametrize(
    ("tokens", "taken", "loaded"),
    [
        (range(406), 0, 197),  # Nothing would be left to compute.
        (range(407), 0, 406),
        (range(192, 430), 0, 406 - 192),  # vLLM's prefix cache has the beginning.
        (range(197, 430), 5, 0),  # Or all that could be loaded.
        (range(430), 5, 197),  # No slots for the second image.
        (range(430), 8, 0),
    ],
)
def test_how_far_a_chain_goes(half: SchedulerHalf, tokens: range, taken: int, loaded: int) -> None:
    half.slots.take(taken)
    assert begin(half, "a", [b"one", b"two"], tokens) == loaded
    assert half.slots.used == taken + {0: 0, 197: 5}.get(loaded, 10)
    step = half.step({"a": tokens.stop})
    assert [load.first for load in step.load] == ([tokens.start] if loaded else [])


def test_the_prefix_cache_gets_no_image_whole(half: SchedulerHalf) -> None:
    """Or a request that finds it there would compute its question without the capsule."""
    half.plan("a", PLACES, images(), [], range(430))
    assert half.exact_tokens("a") == 196
    half.begin("a", PLACES)
    assert half.exact_tokens("a") == 196
    half.step({"a": 100})
    assert half.exact_tokens("a") == 196
    half.step({"a": 197})
    assert half.exact_tokens("a") == 196


def test_requests_that_end_while_they_wait_leave_nothing(half: SchedulerHalf) -> None:
    half.plan("a", PLACES, images(), [b"one"], range(430))
    half.end("a")
    assert half.plans == {} and half.loading("a") == () and half.exact_tokens("a") is None


def test_counts(half: SchedulerHalf) -> None:
    begin(half, "a", [b"one"])
    half.plan("b", PLACES, [], [], range(430))
    half.begin("b", PLACES)
    counts = half.tally.take()["counts"]
    assert counts == {"store_hits": 1, "store_read_bytes": 3, "store_misses": 1, "store_skipped": 1}


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_held_twice_nor_lost(seed: int) -> None:
    """Known and unknown images, planned and not admitted, preempted and ended in random order."""
    draw, half = random.Random(seed), SchedulerHalf(block=BLOCK, tile=BLOCK, slots=23)
    tokens: dict[str, int] = {}
    held: dict[str, list[int]] = {}
    for number in range(300):
        name = f"r{number}"
        loaded = half.plan(name, PLACES, images(), [b"x"] * draw.randrange(3), range(430))
        if draw.random() < 0.3:
            half.begin(name, PLACES, loaded)
            tokens[name] = loaded
        elif draw.random() < 0.5:
            half.end(name)
        for known in list(tokens):
            if draw.random() < 0.1:
                half.end(known)
                del tokens[known]
        scheduled = {known: tokens[known] + draw.choice([1, 64, 300]) for known in tokens if draw.random() < 0.8}
        tokens |= scheduled
        step = half.step(scheduled)
        for gone in step.forget:
            held.pop(gone, None)
        for job in (*step.load, *step.compress):
            held.setdefault(job.request, []).extend(job.slots)
        every = [slot for slots in held.values() for slot in slots]
        assert len(every) == len(set(every)) == half.slots.used
    for name in list(tokens):
        half.end(name)
    assert half.slots.used == 0 and half.requests == {}


class TestKnownImages:
    """Keys, and the doubts that are misses."""

    LENGTH, TEXT, ALIGN = 24, 3, 5

    @pytest.fixture
    def files(self, tmp_path: Path) -> ModelFiles:
        model = tmp_path / "model"
        model.mkdir()
        (model / "model.safetensors").write_bytes(b"weights")
        files = ModelFiles(model)
        assert files.wait() == files_digest(model)
        return files

    @pytest.fixture
    def known(self, files: ModelFiles) -> KnownImages:
        capsule = transform_capsule(GEOMETRY, align=self.ALIGN)
        store = ImageStore(None, max_bytes=10**8)
        return KnownImages(store, capsule, self.ALIGN, range(GEOMETRY.layers), "float32", {"x": 1}, files)

    def request(self, name: str = "a", seed: int = 0, **options: Any) -> Any:
        pixels = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(seed))
        place = SimpleNamespace(extract_embeds_range=lambda: [(self.TEXT, self.TEXT + self.LENGTH - 1)])
        data = SimpleNamespace(get_data=lambda: {"pixels": pixels, "grid": [1, 2]})
        options = {"identifier": f"hash of {seed}", **options}
        feature = SimpleNamespace(
            data=options.pop("data", data), modality="image", identifier=options.pop("identifier"), mm_position=place
        )
        values = {"cache_salt": None, "lora_request": None, "prompt_embeds": None, **options}
        tokens = list(range(self.TEXT + self.LENGTH + 4))
        return SimpleNamespace(**{"request_id": name, "mm_features": [feature], "prompt_token_ids": tokens, **values})

    def put(self, known: KnownImages, request: Any, **header: Any) -> None:
        span = stored_span(known.capsule, self.LENGTH, self.TEXT)
        values = {"weights": known.files.digest(), **header}
        (image,) = known.images(request)
        known.store.put(image.key, to_bytes(span._replace(header=replace(span.header, **values)), known.capsule))
        known.end(request.request_id)

    def test_found_again(self, known: KnownImages) -> None:
        assert known.find(self.request()) == []
        self.put(known, self.request())
        assert len(known.find(self.request())) == 1
        # Asked again while it waits, the store is not read anew.
        known.store.prune(0)
        assert len(known.find(self.request())) == 1
        known.forget("a")
        assert known.find(self.request()) == []

    def test_anything_else_is_a_miss(self, known: KnownImages) -> None:
        self.put(known, self.request())
        tokens = [7, *range(1, self.TEXT + self.LENGTH + 4)]
        assert known.find(self.request("b", seed=1)) == []
        assert known.find(self.request("c", prompt_token_ids=tokens)) == []
        for name, value in (("cache_salt", "s"), ("lora_request", object()), ("prompt_embeds", tokens)):
            assert known.images(self.request(name, **{name: value})) == []
        assert len(known.find(self.request("d"))) == 1
        for values in (None, {}, {"f": object()}, {"address": 5, "monotonic_id": 1}):
            data = None if values is None else SimpleNamespace(get_data=values.copy)
            assert known.images(self.request(str(values), data=data, identifier=str(values))) == []
            # Nor is anything else that comes with the hash, as nobody can tell what vLLM has of it.
            assert known.images(self.request(f"{values} later", identifier=str(values))) == []

    def test_a_hash_that_came_with_other_pixels_is_in_doubt(self, known: KnownImages) -> None:
        assert len(known.images(self.request("a", identifier="mine"))) == 1
        assert known.images(self.request("b", seed=1, identifier="mine")) == []
        assert known.images(self.request("c", identifier="mine")) == []
        assert len(known.images(self.request("d"))) == 1

    def test_a_doubt_that_comes_while_a_request_waits_or_runs(self, known: KnownImages) -> None:
        request = self.request("a", identifier="mine")
        self.put(known, request)
        assert len(known.find(request)) == 1 and known.trusts("a")
        known.see(self.request("b", seed=1, identifier="mine"))
        assert known.find(request) == [] and known.images(request) == [] and not known.trusts("a")
        known.end("a")
        known.end("b")
        assert not known.trusts("a") and not known._seen and not known._waiting

    def test_images_that_come_later_in_a_request_are_seen(self, known: KnownImages) -> None:
        request = self.request("a", identifier="mine")
        known.see(request)
        request.mm_features += self.request("a", seed=1, identifier="mine").mm_features
        assert known.trusts("a")
        known.see(request)
        assert not known.trusts("a")

    @pytest.mark.parametrize("how", ["start", "cache_salt", "prompt_embeds"])
    def test_hashes_of_requests_that_do_not_use_the_store_are_seen_too(self, known: KnownImages, how: str) -> None:
        digest = known.files._digest
        if how == "start":
            known.files._digest = None
        known.see(self.request("a", identifier="mine", **({} if how == "start" else {how: "some"})))
        known.end("a")
        known.files._digest = digest
        assert known.images(self.request("b", seed=1, identifier="mine")) == []

    @pytest.mark.parametrize("header", [{"weights": "other"}, {"start": 5, "text": 3}])
    def test_an_entry_that_is_not_what_its_key_says_is_removed(
        self, known: KnownImages, header: dict[str, Any]
    ) -> None:
        self.put(known, self.request(), **header)
        assert known.find(self.request()) == []
        assert known.store.statistics.damaged == 1 and known.store.entries() == []

    def test_nothing_is_known_before_the_model_is_read(self, known: KnownImages) -> None:
        digest = known.files._digest
        known.files._digest = None
        assert known.images(self.request()) == []
        known.files._digest = digest
        assert len(known.images(self.request())) == 1


def test_files_digest(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = files_digest(tmp_path)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "b").write_bytes(b"2")
    assert files_digest(tmp_path) == first
    (tmp_path / "a").write_bytes(b"2")
    assert files_digest(tmp_path) != first
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "c").write_bytes(b"1")
    assert files_digest(tmp_path) != first


def test_plain_bytes_tell_values_apart() -> None:
    values = [1, 1.0, True, "1", None, [1, 2], [[1], 2], ["1", 2], {"a": 1}, {"a": 2}]
    assert len({plain_bytes(value) for value in values}) == len(values)
    assert plain_bytes(object()) is None and plain_bytes([object()]) is None

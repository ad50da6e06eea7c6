"""What the scheduler's half of the connector decides, and the slots that it hands out: no vLLM is needed."""

import random
from types import SimpleNamespace

import pytest

from kvcapsule.serving.image_blocks import TileBlocks
from kvcapsule.serving.scheduler_half import SchedulerHalf, images_of
from kvcapsule.serving.slots import SlotAllocator

IMAGE = (1, 196)
RUN = TileBlocks(1, 5, 5, 197)


@pytest.fixture
def half() -> SchedulerHalf:
    return SchedulerHalf(block=32, tile=32, slots=12)


def test_slots_are_handed_out_once_and_come_back() -> None:
    slots = SlotAllocator(5)
    first, second = slots.take(2), slots.take(3)
    assert first is not None and second is not None and sorted(first + second) == list(range(5))
    assert slots.take(1) is None and slots.used == 5
    slots.give_back(first)
    assert slots.take(3) is None and slots.used == 3
    assert sorted(slots.take(2) or []) == sorted(first)


def test_an_image_is_compressed_in_the_step_that_ends_it(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE])
    assert half.step({"a": 196}).compress == []
    assert list(half.compressed("a")) == [] and half.exact_tokens("a") is None
    (job,) = half.step({"a": 200}).compress
    assert (job.request, job.run) == ("a", RUN) and len(job.slots) == 5
    assert list(half.compressed("a")) == [RUN]
    # What the same step computed behind the image read it as it is.
    assert half.exact_tokens("a") == 200
    assert half.step({"a": 201}).compress == [] and half.exact_tokens("a") == 200


def test_two_images_of_a_request(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE, (210, 196)])
    assert len(half.step({"a": 300}).compress) == 1
    (second,) = half.step({"a": 410}).compress
    assert second.run == TileBlocks(7, 5, 5, 406)
    # The second image was computed from the first one's capsule.
    assert half.exact_tokens("a") == 300
    assert half.slots.used == 10


def test_both_images_at_once(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE, (210, 196)])
    assert len(half.step({"a": 410}).compress) == 2
    assert half.exact_tokens("a") == 410


def test_a_full_pool_leaves_images_in_their_blocks_until_there_is_room(half: SchedulerHalf) -> None:
    for name in "abc":
        half.begin(name, [IMAGE])
    assert len(half.step(dict.fromkeys("abc", 200)).compress) == 2
    assert half.refused == 1 and list(half.compressed("c")) == [] and half.exact_tokens("c") is None
    # Counted once, asked for in each step.
    assert half.step(dict.fromkeys("abc", 201)).compress == [] and half.refused == 1
    half.end("a")
    (job,) = half.step({"b": 202, "c": 202}).compress
    assert job.request == "c" and half.exact_tokens("c") == 202 and half.refused == 1


def test_a_request_that_ends_gives_its_slots_back_and_workers_forget_it(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE])
    half.step({"a": 200})
    half.end("a")
    half.end("a")
    assert half.slots.used == 0 and half.requests == {}
    assert half.step({}).forget == ["a"] and half.step({}).forget == []


def test_a_preempted_request_begins_anew(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE])
    half.step({"a": 200})
    half.end("a")
    half.begin("a", [IMAGE])
    step = half.step({"a": 230})
    assert step.forget == ["a"] and [job.request for job in step.compress] == ["a"]
    assert half.exact_tokens("a") == 230 and half.slots.used == 5


def test_a_request_that_gets_more_input_keeps_what_it_has(half: SchedulerHalf) -> None:
    half.begin("a", [IMAGE])
    (first,) = half.step({"a": 200}).compress
    half.resume("a", [IMAGE, (230, 196)])
    step = half.step({"a": 300})
    assert step.forget == [] and step.compress == [] and list(half.compressed("a")) == [RUN]
    assert half.slots.used == 5 and half.exact_tokens("a") == 200
    (second,) = half.step({"a": 430}).compress
    assert second.run.end == 426 and not set(first.slots) & set(second.slots) and half.slots.used == 10
    half.resume("a", [IMAGE, (230, 196)])
    assert half.step({"a": 450}).compress == []
    half.end("a")
    assert half.slots.used == 0 and half.step({}).forget == ["a"]


def test_an_image_that_found_no_slot_is_still_waited_for_when_more_input_comes(half: SchedulerHalf) -> None:
    half.slots.take(10)
    half.begin("a", [IMAGE])
    assert half.step({"a": 200}).compress == [] and half.refused == 1
    half.resume("a", [IMAGE])
    half.slots.give_back(list(range(10)))
    (job,) = half.step({"a": 230}).compress
    assert job.run == RUN and half.refused == 1


@pytest.mark.parametrize(("store", "exact"), [(False, None), (True, 425)])
def test_the_first_image_may_come_with_later_input(half: SchedulerHalf, store: bool, exact: int | None) -> None:
    half.trusts = (lambda request: True) if store else None
    half.begin("a", [])
    half.resume("a", [])
    assert half.requests == {}
    half.resume("a", [(230, 196)])
    assert half.exact_tokens("a") == exact
    (job,) = half.step({"a": 426}).compress
    assert job.run.end == 426 and half.exact_tokens("a") == (exact or 426)


def test_text_and_small_images_are_none_of_its_business(half: SchedulerHalf) -> None:
    half.begin("text", [])
    half.begin("icon", [(1, 20)])
    assert half.requests == {}
    step = half.step({"text": 50, "icon": 50})
    assert step.compress == [] and step.forget == []


def test_images_of_counts_the_last_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's ranges include their ends."""
    place = SimpleNamespace(extract_embeds_range=lambda: [(1, 4), (6, 9)])
    assert images_of(SimpleNamespace(mm_features=[SimpleNamespace(mm_position=place)])) == [(1, 4), (6, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_no_slot_is_ever_held_twice_nor_lost(seed: int) -> None:
    """Requests come, grow, are preempted and end in random order."""
    draw, half = random.Random(seed), SchedulerHalf(block=32, tile=32, slots=17)
    tokens: dict[str, int] = {}
    held: dict[str, list[int]] = {}
    for number in range(300):
        if draw.random() < 0.3:
            name = f"r{number}"
            half.begin(name, [(draw.randrange(40), 196)] + [(260, 100)] * draw.randrange(2))
            tokens[name] = 0
        for name in list(tokens):
            if draw.random() < 0.1:
                half.end(name)
                del tokens[name]
                if draw.random() < 0.5:
                    half.begin(name, [(3, 196)])
                    tokens[name] = 0
        scheduled = {name: tokens[name] + draw.choice([1, 64, 300]) for name in tokens if draw.random() < 0.8}
        tokens |= scheduled
        step = half.step(scheduled)
        for name in step.forget:
            held.pop(name, None)
        for job in step.compress:
            held.setdefault(job.request, []).extend(job.slots)
        every = [slot for slots in held.values() for slot in slots]
        assert len(every) == len(set(every)) == half.slots.used
    for name in list(tokens):
        half.end(name)
    assert half.slots.used == 0 and half.requests == {}

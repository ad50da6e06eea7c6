"""The image store inside vLLM: an image that is known is neither encoded nor computed, and the answer is the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageOps
from support.serving_engine import Engine, Engines, questions
from vllm import SamplingParams

from kvcapsule.checkpoints import shipped
from kvcapsule.errors import ConfigError
from kvcapsule.serving.settings import SCHEDULER
from kvcapsule.store.folder import SUFFIX
from kvcapsule.testbeds.pages import pages

COUNT = 8
BLOCKS = "pages-vlm-blocks"
"""A capsule that loses something, so that whether a question read it shows."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return questions(COUNT)


def two_images() -> list[dict[str, Any]]:
    rows = list(pages("test", 8, seed=5))
    return [
        {
            "prompt": f"<|user|><image>{one['prompt']}<|assistant|>{one['answer']}<|end|>"
            f"<|user|><image>{two['prompt']}<|assistant|>",
            "multi_modal_data": {"image": [one["image"], two["image"]]},
        }
        for one, two in zip(rows[::2], rows[1::2], strict=True)
    ]


@contextmanager
def encoded(engine: Engine, keep: bool = False) -> Iterator[list[int]]:
    """The images that the vision tower reads, with vLLM's own caches of images empty; keep: not that of its output."""
    engine.llm.reset_mm_cache()
    core = engine.llm.llm_engine.engine_core.engine_core
    if not keep:
        core.reset_encoder_cache()
    model = core.model_executor.driver_worker.worker.model_runner.model
    calls: list[int] = []
    encode = model.embed_multimodal

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        calls.append(len(out))
        return out

    model.embed_multimodal = watched
    try:
        yield calls
    finally:
        model.embed_multimodal = encode


def ask(engine: Engine, prompts: list[dict[str, Any]], keep: bool = False, **sampling: Any) -> tuple[list[str], int]:
    """The answers, and how many images were encoded for them."""
    with encoded(engine, keep) as calls:
        texts = engine.texts(prompts, **{"max_tokens": 40, **sampling})
    engine.worker.store.flush()
    engine.require_empty()
    return texts, sum(calls)


def test_known_images_are_not_read_again(engines: Engines, folder: Path, prompts: list[dict[str, Any]]) -> None:
    engine = engines(BLOCKS, store=folder)
    first, images = ask(engine, prompts)
    assert images == COUNT and len(list(folder.glob(f"*{SUFFIX}"))) == COUNT
    again, images = ask(engine, prompts)
    assert images == 0 and again == first
    # Another question about the same images, whose answer is that of a store without them.
    others = [{**p, "prompt": p["prompt"].replace("<|assistant|>", "?<|assistant|>")} for p in prompts]
    known, images = ask(engine, others)
    assert images == 0
    engine = engines(BLOCKS, store=folder.with_name("empty"))
    new, images = ask(engine, others)
    assert images == COUNT and known == new
    # Another engine, the same folder.
    engine = engines(BLOCKS, store=folder, enable_prefix_caching=True)
    for _ in range(2):
        later, images = ask(engine, prompts)
        assert images == 0 and later == first


def test_lossless_answers_are_those_of_vllm_alone(
    engines: Engines, tile32: str, folder: Path, prompts: list[dict[str, Any]]
) -> None:
    """Text, images, several of them, in small steps: hit or miss."""
    prompts = [*prompts, *two_images(), *({"prompt": f"<|user|>{p['prompt'][15:]}"} for p in prompts[:2])]
    expected = engines().texts(prompts, max_tokens=40)
    engine = engines(tile32, store=folder, max_num_batched_tokens=300, max_num_seqs=16)
    found, images = ask(engine, prompts)
    assert found == expected and images == COUNT + 8
    found, images = ask(engine, prompts)
    assert found == expected and images == 0
    # A prompt that shares its first image alone.
    rows = two_images()
    mixed = [
        {**one, "multi_modal_data": {"image": [one["multi_modal_data"]["image"][0], other]}}
        for one, other in zip(rows, [p["multi_modal_data"]["image"] for p in questions(len(rows))], strict=True)
    ]
    assert ask(engine, mixed)[1] == len(mixed)
    assert ask(engine, mixed)[1] == 0


def test_nothing_of_a_wrong_image_is_ever_used(engines: Engines, tile32: str, folder: Path) -> None:
    (prompt,) = questions(1)
    image = prompt["multi_modal_data"]["image"]
    engine = engines(tile32, store=folder)
    ask(engine, [prompt])
    almost = image.copy()
    almost.putpixel((0, 0), tuple(255 - x for x in image.getpixel((0, 0))))
    changed = [
        {**prompt, "multi_modal_data": {"image": almost}},
        {**prompt, "multi_modal_data": {"image": ImageOps.mirror(image)}},
        {**prompt, "prompt": "x" + prompt["prompt"]},
    ]
    for other in changed:
        assert ask(engine, [other])[1] == 1
    # A hash that a user sets says nothing: with it come other pixels than before, and what vLLM has of it is in doubt.
    named = [{**p, "multi_modal_uuids": {"image": ["mine"]}} for p in (prompt, changed[0])]
    entries = len(list(folder.glob(f"*{SUFFIX}")))
    assert ask(engine, named[:1])[1] == 0
    for _ in range(2):
        assert ask(engine, named[1:])[1] == 1
    assert ask(engine, named[:1])[1] == 1
    assert len(list(folder.glob(f"*{SUFFIX}"))) == entries
    # A salt, and a request for the probabilities of the prompt's tokens.
    assert ask(engine, [{**prompt, "cache_salt": "s"}])[1] == 1
    assert ask(engine, [prompt], prompt_logprobs=1)[1] == 1


@pytest.mark.parametrize("how", ["salted", "early", "earlier", "at once"])
def test_what_vllm_has_of_a_hash_is_never_stored_for_another_image(
    engines: Engines, tile32: str, folder: Path, how: str
) -> None:
    """A user gives two images one hash, and vLLM still has its vision tower's output for the first, or its KV."""
    one, two = ({**p, "multi_modal_uuids": {"image": ["mine"]}} for p in questions(2))
    engine = engines(tile32, store=folder, enable_prefix_caching=True)
    digest = engine.known.files._digest
    if how == "at once":
        # Both wait when the first is computed.
        engine.llm.llm_engine.add_request("one", one, SamplingParams(max_tokens=8))
        engine.llm.reset_mm_cache()
        engine.llm.llm_engine.add_request("two", two, SamplingParams(max_tokens=8))
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.llm.llm_engine.step()
        engine.worker.store.flush()
    else:
        if how == "early":
            # The model's files are not read yet.
            engine.known.files._digest = None
        first = {**one, "cache_salt": "s"} if how == "salted" else one
        assert ask(engine, [first])[1] == 1
        engine.known.files._digest = digest
        # That vLLM encodes nothing now is its own affair: it goes by the hash.
        assert ask(engine, [two], keep=True)[1] == 0
    stored = 1 if how == "earlier" else 0
    assert len(list(folder.glob(f"*{SUFFIX}"))) == stored
    # Under hashes of their own both are right, whatever came before.
    expected = engines().texts(questions(2), max_tokens=40)
    engine = engines(tile32, store=folder)
    assert ask(engine, questions(2)) == (expected, 2 - stored)


def test_damaged_entries_are_misses(engines: Engines, folder: Path, prompts: list[dict[str, Any]]) -> None:
    engine = engines(BLOCKS, store=folder)
    first, _ = ask(engine, prompts)
    for number, path in enumerate(sorted(folder.glob(f"*{SUFFIX}"))):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if number % 2 else data[:-1] + bytes([data[-1] ^ 1]))
    again, images = ask(engine, prompts)
    assert again == first and images == COUNT
    assert ask(engine, prompts) == (first, 0)


def test_preemption_and_a_full_pool(engines: Engines, tile32: str, folder: Path, prompts: list[dict[str, Any]]) -> None:
    """Requests that lose their blocks come back from the store; those that find no slot are computed."""
    expected = engines().texts(prompts, max_tokens=120, ignore_eos=True)
    for blocks, pool in ((20, None), (64, 500_000)):
        more = {} if pool is None else {"pool_bytes": pool}
        engine = engines(tile32, store=folder, num_gpu_blocks_override=blocks, **more)
        for _ in range(2):
            found, _ = ask(engine, prompts, max_tokens=120, ignore_eos=True)
            assert found == expected
        assert engine.preempted or pool is not None
        assert pool is None or engine.half.refused > 0


def test_blocks_of_known_images_are_never_taken(engines: Engines, folder: Path) -> None:
    (prompt,) = questions(1)
    engine = engines(BLOCKS, store=folder)
    ask(engine, [prompt])
    engine.llm.llm_engine.add_request("one", prompt, SamplingParams(max_tokens=8, ignore_eos=True))
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
        held.append(engine.blocks - engine.free_blocks)
    assert max(held) == 2 and held[-1] == 0


def test_aborted_while_it_waits(engines: Engines, folder: Path) -> None:
    """Each takes two blocks and more, as its image is known, and so they do not all fit in."""
    prompts = questions(12)
    engine = engines(BLOCKS, store=folder, num_gpu_blocks_override=18)
    ask(engine, prompts)
    for number, prompt in enumerate(prompts):
        engine.llm.llm_engine.add_request(str(number), prompt, SamplingParams(max_tokens=60, ignore_eos=True))
    for _ in range(3):
        engine.llm.llm_engine.step()
    assert engine.half.plans and engine.scheduler.waiting
    engine.llm.llm_engine.abort_request(list(engine.scheduler.requests), internal=True)
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    engine.require_empty()
    assert engine.known._waiting == {} and engine.known._seen == {}


def test_vllms_own_scheduler_is_refused(engines: Engines, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"--scheduler-cls {SCHEDULER}"):
        engines(BLOCKS, store=folder, scheduler_cls=None)
    assert shipped("pages-vlm") is not None

"""pages-vlm in vLLM with capsules that store everything: the same answers as vLLM alone, in fewer blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving_engine import Engine, Engines, questions
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from kvcapsule.serving.pool import CapsulePool
from kvcapsule.testbeds.pages import pages

COUNT = 16
SMALL = 33
"""Blocks that hold four prompts with their images as they are."""
OPENING = "<|user|><image>{}<|assistant|>"


def two_images() -> list[dict[str, Any]]:
    """Two images side by side, with the question behind both."""
    rows = list(pages("test", 8, seed=5))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return [
        {
            "prompt": f"<|user|><image><image>{second['prompt']}<|assistant|>",
            "multi_modal_data": {"image": [first["image"], second["image"]]},
        }
        for first, second in pairs
    ]


def turns() -> list[dict[str, Any]]:
    """A first turn about one image, and a second one about another."""
    rows = list(pages("test", 8, seed=6))
    return [
        {
            "prompt": OPENING.format(first["prompt"]) + f"{first['answer']}<|end|>" + OPENING.format(second["prompt"]),
            "multi_modal_data": {"image": [first["image"], second["image"]]},
        }
        for first, second in zip(rows[::2], rows[1::2], strict=True)
    ]


def text_only() -> list[dict[str, Any]]:
    return [{"prompt": f"<|user|>{row['prompt']}<|assistant|>"} for row in pages("test", 4, seed=7)]


def mixed() -> list[dict[str, Any]]:
    """Prompts of all kinds, in turn."""
    kinds = [questions(COUNT), two_images(), turns(), text_only()]
    every: list[dict[str, Any]] = []
    for i in range(COUNT):
        every += [kind[i] for kind in kinds if i < len(kind)]
    return every


MAX_TOKENS = 40


@pytest.fixture(scope="module")
def prompts() -> list[dict[str, Any]]:
    return mixed()


@pytest.fixture(scope="module")
def expected(prompts: list[dict[str, Any]]) -> list[str]:
    """What vLLM answers without capsules."""
    engines = Engines()
    texts = engines().texts(prompts, max_tokens=MAX_TOKENS)
    engines.close()
    return texts


def same(found: list[str], expected: list[str]) -> None:
    wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]
    assert not wrong, f"{len(wrong)} of {len(expected)} answers differ: {wrong[:3]}"


def test_same_answers_and_blocks_given_back(
    engines: Engines, tile32: str, prompts: list[dict[str, Any]], expected: list[str]
) -> None:
    engine = engines(tile32)
    same(engine.texts(prompts, max_tokens=MAX_TOKENS), expected)
    engine.require_empty()
    # While an answer is written, a prompt of seven blocks holds two.
    engine.llm.llm_engine.add_request("one", questions(1)[0], SamplingParams(max_tokens=8, ignore_eos=True))
    held = []
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
        held.append(engine.blocks - engine.free_blocks)
    assert held[0] == 7 and set(held[1:-1]) == {2} and held[-1] == 0
    engine.require_empty()


def test_answers_come_from_the_capsules(
    engines: Engines,
    tile32: str,
    prompts: list[dict[str, Any]],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: with nothing in the slots hardly an answer stays."""
    monkeypatch.setattr(CapsulePool, "put", lambda self, slots, segments: None)
    found = engines(tile32).texts(prompts[:16], max_tokens=MAX_TOKENS)
    assert sum(a == b for a, b in zip(found, expected[:16], strict=True)) <= 6


@pytest.mark.parametrize("tokens", [200, 77, 33])
def test_prefill_in_chunks(
    engines: Engines, tile32: str, prompts: list[dict[str, Any]], expected: list[str], tokens: int
) -> None:
    """Images are cut, and questions are computed from capsules."""
    # An image's encoder output must fit into a step.
    engine = engines(tile32, max_num_batched_tokens=tokens, max_num_seqs=16, disable_chunked_mm_input=False)
    same(engine.texts(prompts[:20], max_tokens=MAX_TOKENS), expected[:20])
    engine.require_empty()


def test_preemption_and_resumption(engines: Engines, tile32: str) -> None:
    """Long answers outgrow a small pool of blocks."""
    engine = engines(num_gpu_blocks_override=SMALL, max_num_seqs=32)
    one = questions(12, seed=3)
    full = engine.texts(one, max_tokens=110, min_tokens=110)
    assert max(engine.running) <= 6
    engine = engines(tile32, num_gpu_blocks_override=SMALL, max_num_seqs=32)
    same(engine.texts(one, max_tokens=110, min_tokens=110), full)
    assert engine.preempted > 0 and max(engine.running) > 6
    engine.require_empty()


def test_more_sequences_at_once(engines: Engines, tile32: str) -> None:
    rows = questions(24, seed=4)
    full = engines(num_gpu_blocks_override=SMALL)
    texts, before = full.texts(rows), max(full.running)
    engine = engines(tile32, num_gpu_blocks_override=SMALL)
    same(engine.texts(rows), texts)
    assert before <= 4 and max(engine.running) >= 8
    engine.require_empty()


def test_a_full_pool(engines: Engines, tile32: str, prompts: list[dict[str, Any]], expected: list[str]) -> None:
    """Images that find no slots stay in their blocks: the answers are right all the same."""
    slot = 32 * 2 * 2 * 32 * 4 * 4
    engine = engines(tile32, pool_bytes=12 * slot + 4000)
    assert 11 <= engine.half.slots.count <= 12
    same(engine.texts(prompts, max_tokens=MAX_TOKENS), expected)
    assert engine.half.refused > 0
    engine.require_empty()


def test_aborted_requests(engines: Engines, tile32: str, prompts: list[dict[str, Any]], expected: list[str]) -> None:
    """At every stage: waiting, with half an image, with one compressed, while answering."""
    engine = engines(tile32, num_gpu_blocks_override=64, max_num_batched_tokens=200, max_num_seqs=16)
    core = engine.llm.llm_engine
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    for i, prompt in enumerate(prompts[:24]):
        core.add_request(str(i), prompt, sampling)
    done: dict[int, str] = {}
    step = 0
    while core.has_unfinished_requests():
        for out in core.step():
            if out.finished:
                done[int(out.request_id)] = out.outputs[0].text
        if step < 24 and step % 2:
            core.abort_request([str(step)])
        step += 1
    kept = [i for i in range(24) if i % 2 == 0]
    assert set(kept) <= set(done)
    same([done[i] for i in kept], [expected[i] for i in kept])
    engine.require_empty()


@pytest.mark.parametrize("budget", [2048, 100])
def test_input_that_comes_piece_by_piece(engines: Engines, tile32: str, tmp_path: Path, budget: int) -> None:
    """vLLM's streaming input: a request stops, keeps its blocks, and goes on with what comes next, images included."""
    asked = questions(3)
    more = {"prompt": "<|end|><|user|>Read line 1.<|assistant|>"}
    pieces = [[asked[0], more, more], [more, asked[1], more], [asked[2], asked[1], more]]
    options: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": 8, "enable_prefix_caching": True}
    expected = streamed(engines(**options), pieces)
    for store in (None, tmp_path / "store"):
        engine = engines(tile32, store=store, **options)
        for _ in range(2):
            assert streamed(engine, pieces) == expected
            engine.require_empty()


def streamed(engine: Engine, sessions: list[list[dict[str, Any]]]) -> list[list[int]]:
    """The tokens that answer all pieces of each session, which run at once."""
    front = engine.llm.llm_engine
    core = front.engine_core
    tokens: list[list[int]] = [[] for _ in sessions]
    sampling = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)

    def add(number: int, prompt: dict[str, Any], resumable: bool) -> None:
        core.add_request(
            front.input_processor.process_inputs(
                str(number), prompt, sampling, supported_tasks=front.get_supported_tasks(), resumable=resumable
            )
        )

    def run() -> None:
        while sum(map(len, tokens)) < wanted:
            for out in core.get_output().outputs:
                tokens[int(out.request_id)] += out.new_token_ids

    wanted = 0
    for pieces in zip(*sessions, strict=True):
        for number, piece in enumerate(pieces):
            add(number, piece, True)
        wanted += 12 * len(sessions)
        run()
    for number in range(len(sessions)):
        add(number, {"prompt_token_ids": [0]}, False)
    core.get_output()
    return tokens


def test_logprobs(engines: Engines, tile32: str) -> None:
    rows = questions(4)
    options = {"max_tokens": 12, "logprobs": 3}

    def read(outs: list[Any]) -> list[list[dict[int, float]]]:
        return [[{k: v.logprob for k, v in at.items()} for at in out.outputs[0].logprobs] for out in outs]

    full = read(engines().ask(rows, **options))
    for a, b in zip(read(engines(tile32).ask(rows, **options)), full, strict=True):
        for x, y in zip(a, b, strict=True):
            shared = sorted(set(x) & set(y))
            assert len(shared) >= 2
            torch.testing.assert_close(
                torch.tensor([x[k] for k in shared]), torch.tensor([y[k] for k in shared]), atol=2e-3, rtol=1e-3
            )


def test_structured_output(engines: Engines, tile32: str) -> None:
    rows = questions(8)
    options = {"max_tokens": 12, "structured_outputs": StructuredOutputsParams(regex=r"[0-9]{6}")}
    full = engines().texts(rows, **options)
    assert all(len(text) == 6 and text.isdecimal() for text in full)
    same(engines(tile32).texts(rows, **options), full)


class TestPrefixCaching:
    """A later request finds what was computed exactly, and never what was computed from capsules."""

    @pytest.fixture
    def rows(self) -> list[dict[str, Any]]:
        return list(pages("test", 4, seed=8))

    @staticmethod
    def conversation(row: dict[str, Any], answer: str) -> dict[str, Any]:
        """A further turn about the same image, behind the answer to the first."""
        prompt = OPENING.format(row["prompt"]) + f"{answer}<|end|><|user|>Transcribe the page.<|assistant|>"
        return {"prompt": prompt, "multi_modal_data": {"image": row["image"]}}

    @pytest.mark.parametrize("tokens", [2048, 210])
    def test_same_answers(
        self, engines: Engines, tile32: str, prompts: list[dict[str, Any]], expected: list[str], tokens: int
    ) -> None:
        engine = engines(tile32, enable_prefix_caching=True, max_num_batched_tokens=tokens)
        some, right = prompts[:12], expected[:12]
        same(engine.texts(some, max_tokens=MAX_TOKENS), right)
        outs = engine.ask(some, max_tokens=MAX_TOKENS)
        same([out.outputs[0].text for out in outs], right)
        assert all(
            out.num_cached_tokens >= 128
            for out, prompt in zip(outs, some, strict=True)
            if "<image>" in prompt["prompt"]
        )
        engine.require_empty()

    @pytest.mark.parametrize("mended", [True, False], ids=["as it is", "control"])
    def test_lossy_rows_are_not_shared(
        self,
        engines: Engines,
        tile32: str,
        rows: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
        mended: bool,
    ) -> None:
        """The first turns are answered from ruined capsules. The second turns find the same tokens, forced upon them,
        and must compute them anew."""
        forced = "".join(f"{row['answer']}\n" for row in pages("test", 12, seed=9))[:160]
        first = [self.conversation(row, forced) for row in rows]
        options = {"max_tokens": 1, "logprobs": 5}
        exact = engines().ask(first, **options)
        engine = engines(tile32, enable_prefix_caching=True, max_num_batched_tokens=230, max_num_seqs=1)
        if not mended:
            monkeypatch.setattr(type(engine.half), "exact_tokens", lambda self, request: None)
        with monkeypatch.context() as patch:
            patch.setattr(CapsulePool, "put", lambda self, slots, segments: None)
            engine.ask(first, **options)
        found = engine.ask(first, **options)
        far = []
        for out, right in zip(found, exact, strict=True):
            a, b = ({k: v.logprob for k, v in x.outputs[0].logprobs[0].items()} for x in (out, right))
            shared = set(a) & set(b)
            far.append(max(abs(a[k] - b[k]) for k in shared) if shared else 1.0)
        assert all(out.num_cached_tokens >= 192 for out in found)
        if mended:
            assert all(out.num_cached_tokens < 256 for out in found) and max(far) < 2e-3
        else:
            assert max(far) > 0.1

"""Chats of lmms-eval, answered by a model with a method, and kvcapsule's own tasks."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from kvcapsule.data.prompts import conversation as one_image
from kvcapsule.data.prompts import encode
from kvcapsule.errors import DataError, InputError
from kvcapsule.eval.lmms.answers import Answerer
from kvcapsule.eval.lmms.arguments import ModelArguments
from kvcapsule.eval.lmms.chats import conversation
from kvcapsule.eval.lmms.questions import TASKS, chat, draw, draw_pairs, scores
from kvcapsule.eval.lmms.rounds import Rounds
from kvcapsule.eval.watched_generate import GREEDY
from kvcapsule.testbeds.pages import page
from kvcapsule.vlm.spans import find_spans

TOKEN_BYTES = 401_408 // 196
SETTINGS = {"max_new_tokens": 24, "do_sample": False}


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer(ModelArguments(pretrained="pages-vlm", dtype="float32", device="cpu"))


def asked(*parts: Any) -> list[dict[str, Any]]:
    """One turn of texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return [{"role": "user", "content": content}]


IMAGES = [page("test", index).image for index in range(2)]


def test_a_batch_of_several_lengths_equals_its_rows(answerer: Answerer) -> None:
    chats = [
        asked(IMAGES[0], "Transcribe the page."),
        asked(IMAGES[0], IMAGES[1], "Read line 2."),
        asked("Read line 1."),
        asked("How many 2s?", IMAGES[0], "or", IMAGES[1], "Read line 3."),
    ]
    with answerer.attached():
        together, measure = answerer.answer(chats, SETTINGS)
        single = [answerer.answer([chat], SETTINGS)[0][0] for chat in chats]
    assert together == single and together[0].startswith(page("test", 0).text[:8])
    assert measure.visual_tokens == [196, 392, 0, 392]
    assert measure.stored.visual == measure.full_visual == 980 * TOKEN_BYTES
    assert measure.prefill > 0 and measure.decode > 0 and measure.new_tokens[0] == 24


def test_a_method_is_what_answers() -> None:
    """Its bytes are those of the method, not of the full cache."""
    answerer = Answerer(ModelArguments(pretrained="pages-vlm", dtype="float32", capsule="pages-vlm-cross-layer"))
    with answerer.attached():
        answers, measure = answerer.answer([asked(IMAGES[0], "Read line 2.")] * 2, SETTINGS)
    assert answers == [" ".join(page("test", 0).lines[1])] * 2
    assert measure.stored.visual == 2 * 10_035 and measure.full_visual == 2 * 401_408


def test_beams_are_those_of_generate(answerer: Answerer) -> None:
    settings = {"max_new_tokens": 8, "num_beams": 3}
    answers, measure = answerer.answer([asked(IMAGES[0], "Transcribe the page.")], settings)
    inputs = encode(answerer.processor, [one_image(IMAGES[:1], "Transcribe the page.")])
    expected = answerer.model.generate(**inputs, **{**GREEDY, **settings})[:, inputs["input_ids"].shape[1] :]
    assert answers == [answerer.processor.decode(expected[0], skip_special_tokens=True)]
    assert measure.stored.visual == measure.full_visual == 3 * 401_408


def test_sampling_is_that_of_generate(answerer: Answerer) -> None:
    torch.manual_seed(1)
    hot, _ = answerer.answer([asked(IMAGES[0], "Transcribe the page.")], {"temperature": 5.0, "max_new_tokens": 16})
    greedy, _ = answerer.answer([asked(IMAGES[0], "Transcribe the page.")], {"max_new_tokens": 16})
    assert hot != greedy


def test_generation_stops_at_a_stop_string(answerer: Answerer) -> None:
    """It stops there, rather than being cut behind the whole answer."""
    prompt = [asked(IMAGES[0], "Transcribe the page.")]
    whole, long = answerer.answer(prompt, {"max_new_tokens": 60})
    cut, short = answerer.answer(prompt, {"max_new_tokens": 60, "until": ["\n"]})
    assert cut == [whole[0].split("\n")[0]] and short.new_tokens[0] < long.new_tokens[0] / 2


def test_settings_that_generate_lacks_are_named_once(answerer: Answerer, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        answerer.answer([asked("Read line 1.")], {"max_new_tokens": 2, "image_aspect_ratio": "pad"})
    assert capsys.readouterr().err.count("image_aspect_ratio") == 1


def test_the_order_of_a_chat_is_kept(answerer: Answerer, tmp_path: Path) -> None:
    IMAGES[1].save(tmp_path / "second.png")
    turns = [
        *asked("a", IMAGES[0].convert("L"), "b", tmp_path / "second.png"),
        {"role": "assistant", "content": "c"},
        *asked("d"),
    ]
    first, answer, last = conversation(turns, answerer.processor)
    assert [part["type"] for part in first["content"]] == ["text", "image", "text", "image"]
    assert [part.get("text") for part in first["content"]] == ["a", None, "b", None]
    assert first["content"][1]["image"].mode == "RGB" and first["content"][3]["image"].size == IMAGES[1].size
    assert answer == {"role": "assistant", "content": [{"type": "text", "text": "c"}]} and last["role"] == "user"
    inputs = encode(answerer.processor, [conversation(turns, answerer.processor)])
    one, two = find_spans(answerer.model.config, inputs["input_ids"], inputs)
    assert one.start + one.length < two.start


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "doc_to_messages, or doc_to_visual and doc_to_text"),
        ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "'audio'; kvcapsule takes text, images"),
        ([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "LlavaProcessor takes images alone"),
        ([{"role": "user", "content": [{"type": "image", "url": "nowhere.png"}]}], "no image nowhere.png"),
        ([{"role": "user", "content": [{"type": "image", "url": 3}]}], "an image of type int"),
    ],
)
def test_content_that_cannot_be_read_is_refused(answerer: Answerer, messages: Any, message: str) -> None:
    with pytest.raises((DataError, InputError), match=message):
        answerer.answer([messages], SETTINGS)


def test_a_part_of_a_video_and_a_missing_one_are_refused(answerer: Answerer) -> None:
    class TakesVideo:
        video_processor = object()

    for part, message in (
        ({"url": {"url": "a.mp4", "video_start": 1.0}}, "reads whole videos"),
        ({"url": "a.mp4", "end_time": 2.0}, "reads whole videos"),
        ({"url": "a.mp4"}, "no video a.mp4"),
    ):
        with pytest.raises((DataError, InputError), match=message):
            conversation([{"role": "user", "content": [{"type": "video", **part}]}], TakesVideo())  # type: ignore[arg-type]


def test_rounds_follow_the_task() -> None:
    def to_messages(row: dict[str, int], **rounds: Any) -> Any:
        if not rounds:
            return asked("first")
        assert rounds["round_idx"] == len(rounds["previous_output"])
        count = (rounds["previous_round_info"] or 0) + 1
        return asked(rounds["previous_output"][-1]), count == row["rounds"], None, count

    rounds = Rounds({"rounds": 3}, to_messages)
    seen = []
    while (messages := rounds.messages()) is not None:
        seen.append(messages[0]["content"][0]["text"])
        rounds.answers.append(f"answer {len(seen)}")
    assert seen == ["first", "answer 1", "answer 2"]
    single = Rounds({}, lambda row, **rounds: asked("only"))
    assert single.messages() == asked("only")
    single.answers.append("x")
    assert single.messages() is None


def test_pages_are_those_of_kvcapsule_eval() -> None:
    rows = draw(datasets.Dataset.from_list([{"source": "pages", "split": "test", "size": 8, "seed": 0}]))
    assert rows["task"] == ["transcribe"] * 2 + ["line"] * 2 + ["lookup"] * 2 + ["count"] * 2
    assert rows[0]["answer"] == page("test", 0).text and rows[1]["answer"] == page("test", 4).text


def test_the_word_of_a_pair_stands_on_one_page() -> None:
    rows = draw_pairs(datasets.Dataset.from_list([{"split": "test", "size": 12, "seed": 0}]))
    sides = []
    for index, row in enumerate(rows):
        word = row["prompt"].removeprefix("What stands beside ").removesuffix("?")
        numbers = [dict(page("test", 2 * index + side).lines).get(word) for side in range(2)]
        (side,) = [side for side, number in enumerate(numbers) if number is not None]
        assert row["answer"].split()[-2:] == [word, numbers[side]]
        sides.append(side)
        assert all(isinstance(part["url"], Image.Image) for part in chat(row)[0]["content"][:2])
    assert set(sides) == {0, 1}


def test_scores_are_those_of_kvcapsule_eval() -> None:
    assert scores({"task": "transcribe", "answer": "abcd"}, ["abcx"]) == {"accuracy": 0.75, "transcribe": 0.75}
    assert scores({"task": "lookup", "answer": "ant bee 12"}, ["12"]) == {"accuracy": 1.0, "lookup": 1.0}
    assert scores({"task": "line", "answer": "ant 12"}, ["ant 13"]) == {"accuracy": 0.0, "line": 0.0}


def test_a_plan_stands_beside_each_task() -> None:
    tasks = sorted(path.stem for path in TASKS.glob("*.yaml"))
    assert tasks == ["kvcapsule_page_pairs", "kvcapsule_pages", "kvcapsule_pictures"]
    assert all((TASKS / f"{task.removeprefix('kvcapsule_')}.jsonl").is_file() for task in tasks)

"""Models that vLLM runs with classes of its own, random weights: the answers with capsules that store everything are
those without."""

from pathlib import Path
from typing import Any

import pytest
from support.serving_engine import Engines, identity_capsule
from support.serving_models import save_llava, save_qwen

from kvcapsule.testbeds.pages import page

pytestmark = pytest.mark.slow  # engines of several models


def prompts(before: str, behind: str, sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """An image each, and one prompt with two."""
    images = [page("test", i).image.resize(size) for i, size in enumerate(sizes)]
    mark = before + behind
    words = ["Read line 4.", "Count the words.", "Transcribe the page.", "Find lamp."]
    single = [
        {"prompt": f"<|user|>{mark}{words[i % 4]}<|assistant|>", "multi_modal_data": {"image": image}}
        for i, image in enumerate(images)
    ]
    both = f"<|user|>{words[0]}{mark}{words[1]}{mark}{words[2]}<|assistant|>"
    return [*single, {"prompt": both, "multi_modal_data": {"image": images[:2]}}]


CASES = {
    "llava": (save_llava, prompts("<image>", "", [(168, 168)] * 5)),
    "qwen2.5-vl": (
        save_qwen,
        prompts("<|vision_start|><|image_pad|>", "<|vision_end|>", [(280, 252), (336, 224), (252, 308), (280, 280)]),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_same_answers(name: str, engines: Engines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, asked = CASES[name]
    folder = tmp_path / name
    save(folder)
    options: dict[str, Any] = {"model": str(folder), "model_impl": "auto"}
    sampling: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
    expected = engines(**options).texts(asked, **sampling)
    assert len(set(expected)) > len(expected) // 2, "the model says the same to all"
    capsule = identity_capsule(str(folder), 32, tmp_path / "capsule")
    engine = engines(capsule, **options)
    step, most = engine.half.step, []

    def noted(computed: dict[str, int]) -> Any:
        plan = step(computed)
        most.append(engine.half.slots.used)
        return plan

    monkeypatch.setattr(engine.half, "step", noted)
    assert engine.texts(asked, **sampling) == expected
    assert max(most) >= 2 * len(asked)
    engine.require_empty()
    # In chunks, so that rows of several tokens read capsules too.
    engine = engines(capsule, max_num_batched_tokens=101, max_num_seqs=4, **options)
    assert engine.texts(asked, **sampling) == expected
    engine.require_empty()

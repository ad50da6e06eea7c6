"""attach(..., store=...): what cannot be served runs without the store."""

from typing import Any

import pytest
import torch
from support import tiny_vlm
from support.family_models import OPTIONS, built
from support.stored_prompts import Setting, assert_identical, number

from kvcapsule import ImageStore
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import ConfigError
from kvcapsule.inference.attach import attach
from kvcapsule.policy import Full


def unserved(setting: Setting) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Prompts and options that a store does not serve."""
    tiny, prompt = setting.of.tiny, setting.prompt(0)
    picture = tiny.picture(0)
    embedded = {"position_ids": torch.arange(prompt["input_ids"].shape[1])[None]}
    return {
        "rows": (tiny_vlm.batch(tiny, [5, picture, 7], [5, picture, 7]), {}),
        "padding": (padded(prompt), {}),
        "beams": (prompt, {"num_beams": 2}),
        "answers": (prompt, {"num_return_sequences": 2, "do_sample": True}),
        "lookup": (prompt, {"prompt_lookup_num_tokens": 2}),
        "static": (prompt, {"cache_implementation": "static"}),
        "hidden": (prompt, {"output_hidden_states": True}),
        "positions": ({**prompt, **embedded}, {}),
        "feature layer": (prompt, {"vision_feature_layer": -1}),
        "ends with an image": (
            tiny_vlm.batch(tiny, [5, picture.tokens[0], picture._replace(tokens=[90] * picture.spans[0])]),
            {},
        ),
        "no cache": (prompt, {"use_cache": False}),
    }


def padded(prompt: Any) -> Any:
    mask = prompt["attention_mask"].clone()
    mask[0, 0] = 0
    return {**prompt, "attention_mask": mask}


@pytest.mark.parametrize("name", list(unserved(Setting(built(number("llava"))))))
def test_what_cannot_be_served_runs_without_the_store(
    name: str, llava: Setting, capsule: Capsule, store: ImageStore, caplog: pytest.LogCaptureFixture
) -> None:
    prompt, options = unserved(llava)[name]
    torch.manual_seed(0)
    expected = llava.plain(capsule, prompt, **options)
    for count in (1, 2):
        torch.manual_seed(0)
        out, seen = llava.ask(store, capsule, prompt, **options)
        assert torch.equal(out.sequences, expected.sequences)
        assert seen > 0 and store.statistics.skipped == (0 if name == "no cache" else count)
    assert store.statistics.puts == store.statistics.misses == 0
    assert len([m for m in caplog.messages if "image store" in m]) == (name != "no cache")


def test_rotations_by_the_prompts_length_run_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    text = llava.model.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "rope_type": "dynamic", "factor": 2.0}
    llava.ask(store, capsule, llava.prompt(0))
    assert store.statistics.skipped == 1 and store.statistics.puts == 0


def test_a_model_in_training_or_under_autocast_runs_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    with torch.autocast("cpu"):
        llava.ask(store, capsule, llava.prompt(0))
    llava.model.train()
    llava.ask(store, capsule, llava.prompt(0))
    assert store.statistics.skipped == 2 and store.statistics.puts == 0


def test_weights_that_are_not_in_memory_run_without_the_store(
    llava: Setting, capsule: Capsule, store: ImageStore
) -> None:
    from accelerate import cpu_offload

    prompt = llava.prompt(0)
    cpu_offload(llava.model, execution_device=torch.device("cpu"))
    with attach(llava.model, capsule, store):
        try:
            llava.model.generate(**prompt, **OPTIONS)
        except AttributeError as error:
            # transformers 5.23's own, with any cache.
            assert "pooler_output" in str(error)
    assert store.statistics.skipped == 1 and store.statistics.puts == 0


def test_text_alone_is_no_matter_of_the_store(llava: Setting, capsule: Capsule, store: ImageStore) -> None:
    prompt = tiny_vlm.batch(llava.of.tiny, [5, 6, 7])
    out, _ = llava.ask(store, capsule, prompt)
    assert_identical(out, llava.plain(capsule, prompt))
    assert store.statistics.skipped == store.statistics.misses == 0


def test_only_a_capsule_has_a_store(llava: Setting, store: ImageStore) -> None:
    for method in (Full(), None):
        with pytest.raises(ConfigError, match="attach a Capsule"), attach(llava.model, method, store):
            pass
    assert llava.model.config.get_text_config()._attn_implementation != "kvcapsule"

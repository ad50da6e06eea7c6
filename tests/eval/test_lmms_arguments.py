"""What `lmms-eval --model_args` may name, and the generation settings of a task."""

import pytest

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.eval.lmms.arguments import ModelArguments
from kvcapsule.eval.lmms.generation import generation
from kvcapsule.policy import POLICIES, SnapKV


def arguments(**values: object) -> ModelArguments:
    return ModelArguments.of({"pretrained": "pages-vlm", **values})


def test_neither_is_the_full_cache() -> None:
    assert arguments().method() is None and arguments(policy="full").method() is None


def test_capsules_and_policies_by_name() -> None:
    assert isinstance(arguments(capsule="pages-vlm-cross-layer").method(), Capsule)
    assert arguments(policy="snapkv", budget=0.1, window=16).method() == SnapKV(0.1, window=16)
    assert arguments(policy="snapkv", retention=0.1).method() == SnapKV(0.1)
    assert arguments(policy="int4").method() == POLICIES["quantized"](bits=4)  # type: ignore[call-arg]
    assert arguments(policy="kivi4", group=16).method() == POLICIES["kivi"](bits=4, group=16)  # type: ignore[call-arg]
    assert arguments(policy="vl-cache", budget=0.2).method() == POLICIES["vl-cache"](budget=0.2)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", [*POLICIES, "int8", "int3", "int2", "kivi2"])
def test_every_policy_can_be_had(name: str) -> None:
    policy = POLICIES.get(name)
    needs = {} if policy is None or policy.budget_field is None else {"budget": 0.5}
    method = arguments(policy=name, **needs, **({"bits": 4} if name == "quantized" else {})).method()
    assert name == "full" or method is not None


def test_a_list_is_written_in_brackets() -> None:
    assert arguments(policy="akvq-vl", text_layers="[0, 1]").settings == {"text_layers": [0, 1]}


def test_a_name_of_digits_is_a_name() -> None:
    assert arguments(capsule=4).capsule == "4"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batchsize": 4}, "no argument 'batchsize'; did you mean 'batch_size'\\? There are pretrained, "),
        (
            {"policy": "snapkv", "budget": 0.1, "windows": 4},
            "did you mean 'window'\\? .* and of snapkv retention, window",
        ),
        ({"window": 4}, "no argument 'window'"),
        ({"policy": "snapky"}, "did you mean 'snapkv'"),
        ({"policy": "snapkv"}, "policy=snapkv needs budget=SHARE"),
        ({"policy": "snapkv", "budget": 0.1, "retention": 0.1}, "the same setting of snapkv"),
        ({"policy": "snapkv", "budget": 2}, "snapkv: "),
        ({"policy": "int4", "budget": 0.1}, "policy=int4 has no budget"),
        ({"policy": "int4", "bits": 3}, "no argument 'bits'"),
        ({"capsule": "pages-vlm-cross-layer", "budget": 0.1}, "a capsule has no budget"),
        ({"budget": 0.1}, "the full cache has no budget"),
        ({"capsule": "a", "policy": "int4"}, "two methods"),
        ({"pretrained": ""}, "add pretrained=MODEL"),
        ({"batch_size": "auto"}, "batch_size=auto: a whole number"),
        ({"batch_size": 0}, "batch_size=0: a whole number"),
        ({"device_map": "cuda:1"}, "named by device="),
        ({"device_map": "auto", "device": "cpu"}, "leave out the device"),
        ({"num_frames": 4, "fps": 1}, "name one of them"),
        ({"fps": 0}, "fps=0: a number above 0"),
    ],
)
def test_what_cannot_be_used_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        arguments(**values).method()


@pytest.mark.parametrize(
    ("settings", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0, "do_sample": True}, False),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
    ],
)
def test_sampling_is_by_do_sample_and_temperature(settings: dict[str, object], sampled: bool) -> None:
    options = generation(settings, 32).options
    assert options["do_sample"] is sampled
    assert options.get("temperature") == (settings.get("temperature") if sampled else None)


def test_settings_reach_generate() -> None:
    how = generation({"max_new_tokens": 5, "num_beams": 3, "repetition_penalty": 1.1, "image_aspect_ratio": "pad"}, 32)
    assert how.options["max_new_tokens"] == 5 and how.options["num_beams"] == 3
    assert how.options["repetition_penalty"] == 1.1 and how.unused == ["image_aspect_ratio"]
    assert generation({}, 32).options["max_new_tokens"] == 32
    assert generation({"use_cache": False, "num_return_sequences": 2}, 32).unused == [
        "use_cache",
        "num_return_sequences",
    ]
    assert "top_p" not in generation({"temperature": 1.0, "top_p": 0}, 32).options
    assert generation({"temperature": 1.0, "top_p": 0.9}, 32).options["top_p"] == 0.9


def test_an_answer_ends_before_the_first_stop() -> None:
    how = generation({"until": ["\n\n", "END", ".", ""]}, 32)
    assert how.stops == ["END", "."]
    assert [how.cut(text) for text in ("a. b END", "a END b.", "a\n\nb")] == ["a", "a ", "a\n\nb"]
    assert generation({"until": "END"}, 32).stops == ["END"] and generation({"until": None}, 32).stops == []

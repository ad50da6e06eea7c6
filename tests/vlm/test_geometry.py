"""The KV geometry of the usual families is read from their configs, and another one is refused with both in the
message."""

import json
from dataclasses import replace
from typing import Any

import pytest
from transformers import (
    AyaVisionConfig,
    Florence2Config,
    Gemma3Config,
    Gemma3nConfig,
    Gemma4Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MllamaConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)

from kvcapsule.errors import ConfigError, GeometryError
from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers

SECTIONS = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
INTERLEAVED = {**SECTIONS, "mrope_interleaved": True}


geometry = KVGeometry
GEMMA = geometry("gemma3", 26, 8, 4, 256, "1d", (5, 11, 17, 23))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlavaConfig(), geometry("llava", 32, 32, 32, 128, "1d")),
        (Qwen2VLConfig(text_config={"rope_parameters": SECTIONS}), geometry("qwen2_vl", 80, 64, 8, 128, "mrope")),
        (Qwen2_5_VLConfig(text_config={"rope_parameters": SECTIONS}), geometry("qwen2_5_vl", 80, 64, 8, 128, "mrope")),
        (
            Qwen3VLConfig(text_config={"rope_parameters": INTERLEAVED}),
            geometry("qwen3_vl", 32, 32, 32, 128, "mrope-interleaved"),
        ),
        (InternVLConfig(), geometry("internvl", 32, 32, 32, 128, "1d")),
        (Gemma3Config(), GEMMA),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_families(config: PreTrainedConfig, expected: KVGeometry) -> None:
    assert KVGeometry.from_config(config) == expected


def test_head_dim_is_that_of_the_config_where_it_has_one() -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
    }
    read = KVGeometry.from_config(LlavaConfig(text_config=LlamaConfig(**sizes, head_dim=20)))
    assert (read.head_dim, read.layers, read.kv_heads, read.query_heads, read.group) == (20, 3, 2, 4, 2)
    assert KVGeometry.from_config(LlavaConfig(text_config=LlamaConfig(**sizes))).head_dim == 12


def test_layers_with_a_window_are_told_apart() -> None:
    assert full_attention_layers(Gemma3Config()) == [5, 11, 17, 23]
    assert full_attention_layers(LlavaConfig()) == list(range(32))
    # A window that no list of layers repeats is every layer's.
    assert full_attention_layers(Mistral3Config(text_config={"model_type": "mistral", "sliding_window": 8})) == []


def test_heads_are_those_of_the_full_attention_layers() -> None:
    text = {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "global_head_dim": 16,
    }
    assert KVGeometry.from_config(Gemma4Config(text_config=text)).head_dim == 16
    unlike = LlavaConfig(text_config=LlamaConfig(num_hidden_layers=2, per_layer_config={1: {"num_key_value_heads": 8}}))
    with pytest.raises(
        GeometryError, match=r"differ in \(query heads, KV heads, head dim\): \[\(32, 8, 128\), \(32, 32, 128\)\]"
    ):
        KVGeometry.from_config(unlike)


def test_keys_that_are_not_rotated() -> None:
    """Cohere 2 rotates in its windowed layers alone."""
    assert KVGeometry.from_config(AyaVisionConfig()).rotary == "none"


def test_windows_alone_are_refused() -> None:
    with pytest.raises(GeometryError, match="mistral3: none of its 2 layers has full attention"):
        KVGeometry.from_config(
            Mistral3Config(text_config={"model_type": "mistral", "sliding_window": 8, "num_hidden_layers": 2})
        )


def test_layers_that_share_keys_are_refused() -> None:
    with pytest.raises(GeometryError, match="gemma3n: its last 15 layers read keys and values of earlier ones"):
        KVGeometry.from_config(Gemma3nConfig())


@pytest.mark.parametrize("config", [Florence2Config(), MllamaConfig()], ids=lambda config: config.model_type)
def test_cross_attention_is_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(GeometryError, match=f"{config.model_type}.*cross-attention.*LLaVA"):
        KVGeometry.from_config(config)


def test_models_without_heads_are_refused() -> None:
    with pytest.raises(GeometryError, match="num_attention_heads"):
        KVGeometry.from_config(PreTrainedConfig())


def test_require_names_both_and_what_differs() -> None:
    mine = geometry("llava", 4, 4, 2, 32, "1d")
    mine.require(replace(mine))
    other = replace(mine, layers=28, rotary="mrope")
    with pytest.raises(GeometryError) as caught:
        mine.require(other)
    message = str(caught.value)
    assert "(layers: 4 != 28, rotary: 1d != mrope)" in message
    assert str(mine.to_dict()) in message
    assert str(other.to_dict()) in message
    assert "kvcapsule train" in message


def test_dict_and_back() -> None:
    mine = geometry("llava", 4, 4, 2, 32, "1d")
    assert "full_attention" not in mine.to_dict()
    for one in (mine, GEMMA):
        assert KVGeometry.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_layers_with_codecs_are_numbered() -> None:
    assert list(geometry("llava", 4, 4, 2, 32, "1d").capsule_layers) == [0, 1, 2, 3]
    assert [GEMMA.place(layer) for layer in GEMMA.capsule_layers] == [0, 1, 2, 3]
    with pytest.raises(
        GeometryError, match=r"layer 6 holds no capsule: of its 26 layers, gemma3 has full attention in"
    ):
        GEMMA.place(6)


@pytest.mark.parametrize("some", [[], [1, 1], [3, 2], [-1, 2], [2, 26], list(range(26)), [True], ["5"], 5])
def test_layers_that_no_model_has_are_refused(some: Any) -> None:
    with pytest.raises((GeometryError, ConfigError), match="full_attention"):
        KVGeometry.from_dict({**GEMMA.to_dict(), "full_attention": some})


def test_other_full_attention_layers_are_refused() -> None:
    with pytest.raises(GeometryError, match=r"\(full_attention: \[5, 11, 17, 23\] != all\)"):
        GEMMA.require(replace(GEMMA, full_attention=()))

"""What depends on the version of transformers is asked in one place, and a version outside the range is refused by
attach."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.run_vlm import Model, assert_same
from transformers import BatchFeature, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvcapsule.errors import ModelError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.cache import CapsuleCache
from kvcapsule.inference.transformers_api import (
    CACHE_ARGUMENT,
    cache_argument,
    output_cache,
    passed_cache,
    replace_output_cache,
    require_supported_transformers,
    rotation_per_token,
    set_cache,
)
from kvcapsule.policy import Full
from kvcapsule.vlm.families import TRANSFORMERS

ROOT = Path(__file__).resolve().parents[2]
API = ROOT / "kvcapsule" / "inference" / "transformers_api.py"


class TestVersions:
    @pytest.mark.parametrize(
        "version", ["5.16.0", "5.16.1", "5.19.0", "5.24.9", "5.24.0.dev0", transformers.__version__]
    )
    def test_supported(self, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(transformers, "__version__", version)
        require_supported_transformers()

    @pytest.mark.parametrize("version", ["4.57.1", "5.15.3", "5.25.0", "5.40.0", "6.0.0"])
    def test_refused_by_attach(self, version: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        before = model.config.text_config._attn_implementation
        monkeypatch.setattr(transformers, "__version__", version)
        with pytest.raises(ModelError) as refusal, attach(model, Full()):
            pass
        message = str(refusal.value)
        assert TRANSFORMERS in message and f"{version} is installed" in message and "pip install" in message
        assert "\n" not in message
        assert model.config.text_config._attn_implementation == before


class TestNames:
    def test_argument_is_the_one_that_models_take(self) -> None:
        assert CACHE_ARGUMENT in GenerationMixin.prepare_inputs_for_generation.__annotations__
        assert cache_argument(7) == {CACHE_ARGUMENT: 7}

    def test_passed_under_either_name(self) -> None:
        assert passed_cache({}) is None
        assert passed_cache(cache_argument("cache")) == "cache"
        assert passed_cache({"past_key_values": "cache", "use_cache": True}) == "cache"
        arguments = {"past_key_values": None, "use_cache": True}
        set_cache(arguments, "other")
        assert arguments == {"use_cache": True, CACHE_ARGUMENT: "other"}

    def test_output(self) -> None:
        output = CausalLMOutputWithPast(logits=torch.ones(1), **cache_argument("first"))
        other = replace_output_cache(output, "second")
        assert (output_cache(output), output_cache(other)) == ("first", "second")
        assert type(other) is type(output) and other.logits is output.logits

    @pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")  # what the user's own call deserves
    def test_users_may_pass_the_old_name(
        self, model: Model, make_batch: Callable[..., BatchFeature], greedy: dict[str, Any]
    ) -> None:
        batch = make_batch((1, "Read line 2."))
        expected = model.generate(**batch, **greedy)
        with attach(model, Full()):
            cache = CapsuleCache(model.config, Full())
            out = model.generate(**batch, **greedy, past_key_values=cache)
            assert output_cache(out) is cache and cache.bytes().total > 0
            assert_same(out, expected)
            assert isinstance(output_cache(model.generate(**batch, **greedy, past_key_values=None)), CapsuleCache)

    def test_no_other_file_names_the_cache_argument(self) -> None:
        found = []
        for folder in ("kvcapsule", "training", "eval", "tests"):
            for path in (ROOT / folder).rglob("*.py"):
                if path in (API, Path(__file__).resolve()):
                    continue
                for node in ast.walk(ast.parse(path.read_text())):
                    names = [getattr(node, field, None) for field in ("arg", "attr", "value")]
                    if "past_key_values" in [name for name in names if isinstance(name, str)]:
                        found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
        assert not found, "\n".join(found)


class _Rotary(torch.nn.Module):
    """As the rotary modules of Qwen2-VL before transformers 5.17."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"rope_parameters": {"mrope_section": [1, 2, 1]}})()


class _InterleavedRotary(torch.nn.Module):
    """As that of GLM-4V before transformers 5.17: its file has a function `rotate_half_llm`."""

    def apply_mrope(self) -> None:
        raise NotImplementedError


def rotate_half_llm() -> None:
    raise NotImplementedError


class TestRotation:
    def test_one_rotation_a_token_is_left(self) -> None:
        cos, sin = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        assert rotation_per_token(_Rotary(), cos, sin) == (cos, sin)

    def test_sections_of_three_axes_are_picked(self) -> None:
        """Channels of half a head belong to the axes 0 1 1 2, twice."""
        axes = torch.arange(3.0)[:, None, None, None].expand(3, 2, 5, 8)
        cos, sin = rotation_per_token(_Rotary(), axes, -axes)
        expected = torch.tensor([0.0, 1, 1, 2, 0, 1, 1, 2]).expand(2, 5, 8)
        assert torch.equal(cos, expected) and torch.equal(sin, -expected)

    def test_layout_of_neighbouring_channels(self) -> None:
        half = torch.tensor([1.0, 2, 3, 4]).expand(1, 2, 4)
        cos, sin = rotation_per_token(_InterleavedRotary(), torch.cat([half, half], -1), -torch.cat([half, half], -1))
        expected = torch.tensor([1.0, 1, 2, 2, 3, 3, 4, 4]).expand(1, 2, 8)
        assert torch.equal(cos, expected) and torch.equal(sin, -expected)

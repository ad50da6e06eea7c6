"""How the installed transformers names things, and which versions are supported; everything else asks here.

From 5.24 on a cache is passed to forward and generate as `cache` and returned under that name. Before it was
`past_key_values`, which 5.24 still takes with a deprecation warning. From 5.17 on every rotary module gives one
rotation a token. From 5.18 on generate encodes the images before the prefill (ENCODES_IMAGES).
"""

import sys
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import transformers
from packaging.specifiers import SpecifierSet
from transformers import GenerationMixin, PreTrainedModel

from ..errors import ModelError
from ..vlm.families import TRANSFORMERS

_OLD_ARGUMENT = "past_key_values"
_TAKES_CACHE = "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters

CACHE_NAMES = ("cache", _OLD_ARGUMENT)
"""Names of the cache argument in any version."""
CACHE_ARGUMENT = "cache" if _TAKES_CACHE else _OLD_ARGUMENT
"""The name under which forward and generate take a cache and return one."""

ENCODES_IMAGES = hasattr(GenerationMixin, "_supports_mm_encoder_outputs")
"""Whether generate encodes the images first and hands their features to the prefill (`mm_encoder_outputs`)."""


def require_supported_transformers() -> None:
    """Refuse a transformers whose cache and attention interfaces were not tested.

    Raises:
        ModelError: with the versions that are supported, and how to get one.
    """
    version = transformers.__version__
    # A development version of a release in the range counts as that release.
    if not SpecifierSet(TRANSFORMERS).contains(version, prereleases=True):
        raise ModelError(
            f"kvcapsule attaches to models of transformers {TRANSFORMERS}, and {version} is installed: run `pip install"
            f" 'transformers{TRANSFORMERS}'`."
        )


def cache_argument(cache: Any) -> dict[str, Any]:
    """The keyword argument that hands a cache to forward or generate: `model(**inputs, **cache_argument(cache))`."""
    return {CACHE_ARGUMENT: cache}


def passed_cache(arguments: Mapping[str, Any]) -> Any:
    """The cache among the keyword arguments of a forward or a generate, under whichever name; None if there is none."""
    cache = arguments.get(CACHE_ARGUMENT)
    return arguments.get(_OLD_ARGUMENT) if cache is None else cache


def set_cache(arguments: dict[str, Any], cache: Any) -> None:
    """Make `cache` the one that these keyword arguments hand to forward or generate."""
    arguments.pop(_OLD_ARGUMENT, None)
    arguments[CACHE_ARGUMENT] = cache


def prompt_positions(model: PreTrainedModel, input_ids: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The positions that generate would give to the tokens of prompts [B, N], [..., B, N]; without a mask among the
    inputs there is no padding. Models with M-RoPE store their rope deltas on the way. None: the model's
    forward takes no position_ids."""
    if "position_ids" not in signature(model.forward).parameters:
        return None
    named = {"attention_mask": torch.ones_like(input_ids), **inputs, "input_ids": input_ids}
    positions: torch.Tensor = model._prepare_position_ids_for_generation(input_ids, named)  # type: ignore[operator]
    return positions


def last_logits_argument(model: PreTrainedModel) -> dict[str, int]:
    """The argument that makes a forward compute the logits of the last token alone, if the model takes it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}


def output_cache(output: Any) -> Any:
    """The cache in what a forward or a generate returned; None if it holds none."""
    return getattr(output, CACHE_ARGUMENT)


def replace_output_cache(output: Any, cache: Any) -> Any:
    """A copy of what a forward returned, with another cache in it."""
    return type(output)(**{**output, CACHE_ARGUMENT: cache})


def rotation_per_token(
    rotary: torch.nn.Module, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rotary module returned as cos and sin [B or 1, N, R], channel by channel as keys are rotated.

    From transformers 5.17 on it is returned so. Before, Qwen2-VL and Qwen2.5-VL returned one rotation for each of the
    three position axes, [3, B, N, R], whose sections their attention layers picked; and GLM-4V's and GLM-4.6V's layers
    rotated channels 2i and 2i + 1 together by a rotation laid out for channels half a head apart.
    """
    config: Any = getattr(rotary, "config", None)
    if cos.dim() == 4:
        sections = config.rope_parameters["mrope_section"] * 2
        return _pick_sections(cos, sections), _pick_sections(sin, sections)
    if hasattr(rotary, "apply_mrope") and hasattr(sys.modules[type(rotary).__module__], "rotate_half_llm"):
        return _interleave(cos), _interleave(sin)
    return cos, sin


def _pick_sections(rotation_3BNR: torch.Tensor, sections: list[int]) -> torch.Tensor:
    parts = rotation_3BNR.split(sections, dim=-1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=-1)


def _interleave(rotation_BNR: torch.Tensor) -> torch.Tensor:
    return rotation_BNR[..., : rotation_BNR.shape[-1] // 2].repeat_interleave(2, dim=-1)

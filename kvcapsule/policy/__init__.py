"""Training-free methods, one a file. A policy is registered by its import here, under the name of its file; this order
is that of `kvcapsule methods` and of reports."""
# ruff: noqa: I001

from inspect import isabstract
from typing import Any

from ..extensions import Registry

from .base import HeadPruning as HeadPruning, Policy as Policy, TokenPruning as TokenPruning
from .base import VisualPolicy as VisualPolicy
from .combine import Combined as Combined
from .text import QuantizedText as QuantizedText, TextPolicy as TextPolicy, TextPruning as TextPruning

from .full import Full as Full
from .post_vision_attention import PostVisionAttention as PostVisionAttention
from .evenly_spaced import EvenlySpaced as EvenlySpaced
from .random import Random as Random
from .streaming_llm import StreamingLLM as StreamingLLM
from .snapkv import SnapKV as SnapKV
from .h2o import H2O as H2O
from .pyramidkv import PyramidKV as PyramidKV
from .adakv import AdaKV as AdaKV
from .look_m import LookM as LookM
from .mixkv import MixKV as MixKV
from .quantized import Quantized as Quantized
from .fp8 import Fp8 as Fp8
from .kivi import Kivi as Kivi
from .turboquant import TurboQuant as TurboQuant
from .r_kv import RKV as RKV
from .vl_cache import VLCache as VLCache
from .aircache import AirCache as AirCache
from .tgv_kv import TgvKV as TgvKV
from .flashcache import FlashCache as FlashCache
from .akvq_vl import AkvqVl as AkvqVl
from .hybridkv import HybridKV as HybridKV


def _registered() -> dict[str, type[Policy]]:
    policies: dict[str, type[Policy]] = {}
    for policy in list(globals().values()):
        if not isinstance(policy, type) or not issubclass(policy, Policy) or issubclass(policy, TextPolicy):
            continue
        if not isabstract(policy):
            name = policy.__module__.rpartition(".")[2].replace("_", "-")
            if name in policies:
                raise ValueError(f"{policies[name].__name__} and {policy.__name__} are both registered as {name!r}.")
            policies[name] = policy
    return policies


POLICIES = _registered()
TEXT_POLICIES: dict[str, type[TextPolicy]] = {"text-pruning": TextPruning, "quantized-text": QuantizedText}
"""What Combined may put beside a method for the visual tokens; a policy with a budget of all tokens can stand there,
too."""


def _is_policy(loaded: Any) -> bool:
    return isinstance(loaded, type) and issubclass(loaded, Policy)


REGISTRY: Registry[type[Policy]] = Registry(
    "policy", "kvcapsule.policies", POLICIES, "a subclass of kvcapsule.policy.Policy", _is_policy
)
"""POLICIES and those of other packages."""

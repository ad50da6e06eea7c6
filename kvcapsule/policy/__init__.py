"""Training-free methods. POLICIES is the one place where a policy is registered."""

from typing import Any

from ..method import SharedBudget
from .attended import PostVisionAttention
from .base import TokenPruning, VisualPolicy
from .full import Full
from .h2o import H2O
from .hybrid import HybridKV
from .kivi import Kivi
from .pyramid import PyramidKV
from .quantized import Quantized
from .random import Random
from .snapkv import HeadPruning, SnapKV
from .spaced import EvenlySpaced
from .streaming import StreamingLLM

POLICIES: dict[str, type[VisualPolicy] | type[SharedBudget[Any]]] = {
    "full": Full,
    "post-vision-attention": PostVisionAttention,
    "evenly-spaced": EvenlySpaced,
    "random": Random,
    "streaming-llm": StreamingLLM,
    "snapkv": SnapKV,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "quantized": Quantized,
    "kivi": Kivi,
    "hybridkv": HybridKV,
}

__all__ = [
    "H2O",
    "POLICIES",
    "EvenlySpaced",
    "Full",
    "HeadPruning",
    "HybridKV",
    "Kivi",
    "PostVisionAttention",
    "PyramidKV",
    "Quantized",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "TokenPruning",
    "VisualPolicy",
]

"""Training-free methods. POLICIES is the one place where a policy is registered."""

from ..prefill import Method
from .akvq import AkvqVl
from .attended import PostVisionAttention
from .base import TokenPruning, VisualPolicy
from .full import Full
from .h2o import H2O
from .kivi import Kivi
from .pyramid import PyramidKV
from .quantized import Quantized
from .random import Random
from .snapkv import HeadPruning, SnapKV
from .spaced import EvenlySpaced
from .streaming import StreamingLLM

POLICIES: dict[str, type[Method]] = {
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
    "akvq-vl": AkvqVl,
}

__all__ = [
    "H2O",
    "POLICIES",
    "AkvqVl",
    "EvenlySpaced",
    "Full",
    "HeadPruning",
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

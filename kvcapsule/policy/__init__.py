"""Training-free methods. POLICIES is the one place where a policy is registered."""

from .aircache import AirCache
from .akvq import AkvqVl
from .attended import PostVisionAttention
from .base import Policy, TokenPruning, VisualPolicy
from .full import Full
from .h2o import H2O
from .hybrid import HybridKV
from .kivi import Kivi
from .pyramid import PyramidKV
from .quantized import Quantized
from .random import Random
from .rkv import RKV
from .snapkv import HeadPruning, SnapKV
from .spaced import EvenlySpaced
from .streaming import StreamingLLM
from .vlcache import VLCache

POLICIES: dict[str, type[Policy]] = {
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
    "r-kv": RKV,
    "vl-cache": VLCache,
    "aircache": AirCache,
    "akvq-vl": AkvqVl,
    "hybridkv": HybridKV,
}

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "AirCache",
    "AkvqVl",
    "EvenlySpaced",
    "Full",
    "HeadPruning",
    "HybridKV",
    "Kivi",
    "Policy",
    "PostVisionAttention",
    "PyramidKV",
    "Quantized",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "TokenPruning",
    "VLCache",
    "VisualPolicy",
]

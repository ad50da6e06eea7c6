"""Training-free methods. POLICIES is the one place where a policy is registered, TEXT_POLICIES that of those for the
text alone."""

from .adakv import AdaKV
from .aircache import AirCache
from .akvq_vl import AkvqVl
from .base import Policy, TokenPruning, VisualPolicy
from .combine import Combined
from .evenly_spaced import EvenlySpaced
from .full import Full
from .h2o import H2O
from .hybridkv import HybridKV
from .kivi import Kivi
from .look_m import LookM
from .post_vision_attention import PostVisionAttention
from .pyramidkv import PyramidKV
from .quantized import Quantized
from .r_kv import RKV
from .random import Random
from .snapkv import HeadPruning, SnapKV
from .streaming_llm import StreamingLLM
from .text import QuantizedText, TextPolicy, TextPruning
from .vl_cache import VLCache

POLICIES: dict[str, type[Policy]] = {
    "full": Full,
    "post-vision-attention": PostVisionAttention,
    "evenly-spaced": EvenlySpaced,
    "random": Random,
    "streaming-llm": StreamingLLM,
    "snapkv": SnapKV,
    "h2o": H2O,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "look-m": LookM,
    "quantized": Quantized,
    "kivi": Kivi,
    "r-kv": RKV,
    "vl-cache": VLCache,
    "aircache": AirCache,
    "akvq-vl": AkvqVl,
    "hybridkv": HybridKV,
}
TEXT_POLICIES: dict[str, type[TextPolicy]] = {"text-pruning": TextPruning, "quantized-text": QuantizedText}
"""What Combined may put beside a method for the visual tokens; a policy with a budget of all tokens can stand there,
too."""

__all__ = [
    "H2O",
    "POLICIES",
    "RKV",
    "TEXT_POLICIES",
    "AdaKV",
    "AirCache",
    "AkvqVl",
    "Combined",
    "EvenlySpaced",
    "Full",
    "HeadPruning",
    "HybridKV",
    "Kivi",
    "LookM",
    "Policy",
    "PostVisionAttention",
    "PyramidKV",
    "Quantized",
    "QuantizedText",
    "Random",
    "SnapKV",
    "StreamingLLM",
    "TextPolicy",
    "TextPruning",
    "TokenPruning",
    "VLCache",
    "VisualPolicy",
]

"""Training-free methods. POLICIES is the one place where a policy is registered, TEXT_POLICIES that of those for the text alone."""

from .adakv import AdaKV
from .attended import PostVisionAttention
from .base import Policy, TokenPruning, VisualPolicy
from .full import Full
from .h2o import H2O
from .kivi import Kivi
from .lookm import LookM
from .paired import Paired, QuantizedText, TextPolicy, TextPruning
from .pyramid import PyramidKV
from .quantized import Quantized
from .random import Random
from .snapkv import HeadPruning, SnapKV
from .spaced import EvenlySpaced
from .streaming import StreamingLLM

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
}
TEXT_POLICIES: dict[str, type[TextPolicy]] = {"text-pruning": TextPruning, "quantized-text": QuantizedText}
"""What Paired may put beside a method for the visual tokens; a policy with a budget of all tokens can stand there, too."""

__all__ = [
    "H2O",
    "POLICIES",
    "TEXT_POLICIES",
    "AdaKV",
    "EvenlySpaced",
    "Full",
    "HeadPruning",
    "Kivi",
    "LookM",
    "Paired",
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
    "VisualPolicy",
]

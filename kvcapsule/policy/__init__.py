"""Training-free methods. POLICIES is the one place where a policy is registered."""

from .attended import PostVisionAttention
from .base import TokenPruning, VisualPolicy
from .full import Full
from .quantized import Quantized
from .spaced import EvenlySpaced

POLICIES: dict[str, type[VisualPolicy]] = {
    "full": Full,
    "post-vision-attention": PostVisionAttention,
    "evenly-spaced": EvenlySpaced,
    "quantized": Quantized,
}

__all__ = ["POLICIES", "EvenlySpaced", "Full", "PostVisionAttention", "Quantized", "TokenPruning", "VisualPolicy"]

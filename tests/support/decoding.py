"""Models and prompts of generate's ways of decoding."""

from collections.abc import Callable

from transformers import (
    BatchFeature,
)

Batch = Callable[..., BatchFeature]
REPEATING = "Transcribe the page. Transcribe the page."

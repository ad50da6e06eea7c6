"""SmolLM2-135M-Instruct out of its GGUF file, with a token for images added, and its chat template taught where images stand."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"
_TEXT = "message['content']"
_PARTS = (
    "(message['content'] if message['content'] is string else "
    "message['content'] | map('part') | join)"
)


class GgufError(ValueError):
    """The language model cannot be read."""


def read_language_model(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The language model in float32 (its weights were stored in 4 bits, which is the precision they keep) and its tokenizer.

    The tokenizer has one token more, <image>, and the model one row of embeddings more: the mean of the others. As output and input
    embeddings are one, its logit is then the mean of all logits, which is never the largest, so no image token is ever written.

    Raises:
        GgufError: if the gguf package is missing.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError as error:
        raise GgufError('reading SmolLM2 needs the gguf package: pip install -e ".[smol-vlm]".') from error
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer

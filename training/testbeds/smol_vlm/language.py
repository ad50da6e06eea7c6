"""SmolLM2-135M-Instruct from its GGUF file, with an image token and a chat template that places images."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from kvcapsule.errors import KVCapsuleError

IMAGE_TOKEN = "<image>"
_WRITTEN = """{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}"""
_PARTS = (
    """{{'<|im_start|>' + message['role'] + '
'}}{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"""
    f"{{% if part['type'] == 'image' %}}{{{{ '{IMAGE_TOKEN}\\n' }}}}{{% elif part['type'] == 'text' %}}{{{{"
    " part['text'] }}{% endif %}"
    """{% endfor %}{% endif %}{{ '<|im_end|>' + '
' }}"""
)


class SmolError(KVCapsuleError):
    """smol-vlm cannot be made."""


def read_language_model(gguf: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The language model in float32 (with the precision of its stored 4-bit weights) and its tokenizer.

    Raises:
        SmolError: if the gguf package is missing.
    """
    if find_spec("gguf") is None:
        raise SmolError('reading SmolLM2 needs the gguf package: pip install -e ".[smol-vlm]".')
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add <image> at the end of the vocabulary, extend the chat template to content in parts, and return the token's
    id.

    Messages whose content is a string are rendered as before.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, normalized=False, special=True)]}
    )
    tokenizer.chat_template = template_with_parts(tokenizer.chat_template)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def template_with_parts(template: str) -> str:
    """Extend a chat template for strings to lists of parts: an image becomes <image> and a line break, a text is
    copied.

    Raises:
        SmolError: if the template does not contain the expected message block exactly once.
    """
    if template.count(_WRITTEN) != 1:
        raise SmolError(f"the chat template should write {_WRITTEN!r} once; it reads: {template}")
    return template.replace(_WRITTEN, _PARTS)

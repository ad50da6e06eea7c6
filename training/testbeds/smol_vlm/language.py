"""SmolLM2-135M-Instruct out of its GGUF file, with a token for images and a chat template that knows where images
stand."""

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
    """The language model in float32 (its weights keep the precision of the 4 bits they are stored in) and its own
    tokenizer.

    Raises:
        SmolError: if the gguf package is missing.
    """
    if find_spec("gguf") is None:
        raise SmolError('reading SmolLM2 needs the gguf package: pip install -e ".[smol-vlm]".')
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    return model, tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add <image> behind the vocabulary and let the chat template take content in parts; returns the token's number.

    A message whose content is a string is written as before.
    """
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(IMAGE_TOKEN, normalized=False, special=True)]}
    )
    tokenizer.chat_template = template_with_parts(tokenizer.chat_template)
    return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))


def template_with_parts(template: str) -> str:
    """A chat template for strings as one for strings and for lists of parts: an image is <image> and a line break, a
    text itself.

    Raises:
        SmolError: if the template does not write a message's content once.
    """
    if template.count(_WRITTEN) != 1:
        raise SmolError(f"the chat template should write {_WRITTEN!r} once; it reads: {template}")
    return template.replace(_WRITTEN, _PARTS)

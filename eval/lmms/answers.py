"""A VLM with a capsule, a policy or its full cache that answers batches of chats."""

import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from transformers import BatchFeature, LogitsProcessorList

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data.prompts import encode
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.inference.attach import attach
from kvcapsule.inference.transformers_api import cache_argument
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm, require_device
from kvcapsule.vlm.spans import find_spans

from ..equal_bytes import Layout
from ..quality import answered, texts
from ..watched_generate import new_cache
from .arguments import ModelArguments
from .chats import conversation
from .generation import generation
from .measures import BatchMeasure, PrefillWatch, full_token_bytes
from .videos import load_videos


class Answerer:
    """The model and the method that `--model_args` names."""

    def __init__(self, arguments: ModelArguments, device: str | None = None) -> None:
        """Load them.

        Args:
            arguments: see there.
            device: in place of that of the arguments.

        Raises:
            CapsuleError, ConfigError, GeometryError, InputError, ModelError: for arguments that cannot be used.
        """
        self.arguments = arguments
        self.method = arguments.method()
        device = device or arguments.device_map or arguments.device
        require_device(device)
        self.model, self.processor = load_vlm(arguments.pretrained, arguments.revision, arguments.dtype, device)
        if arguments.attn_implementation is not None:
            try:
                self.model.set_attn_implementation(arguments.attn_implementation)
            except (ImportError, ValueError) as error:
                raise ConfigError(f"attn_implementation={arguments.attn_implementation}: {error}") from error
        geometry = KVGeometry.from_config(self.model.config)
        if self.method is not None:
            self.method.require_geometry(geometry)
        if isinstance(self.method, Capsule):
            self.method.to(self.model.device)
        self._token_bytes = full_token_bytes(self.model.config, self.model.dtype)
        self._unused: set[str] = set()

    def attached(self) -> AbstractContextManager[Any]:
        """The block within which `answer` may be called."""
        return nullcontext() if self.method is None else attach(self.model, self.method)

    def answer(self, chats: Sequence[Any], settings: Mapping[str, Any]) -> tuple[list[str], BatchMeasure]:
        """Answer chats as one batch.

        Args:
            chats: lmms-eval's messages, of each question.
            settings: the task's `generation_kwargs`.

        Raises:
            DataError, InputError: for content that cannot be read, or that the model does not take.
        """
        how = generation(settings, self.arguments.max_new_tokens)
        self._name_unused(how.unused)
        inputs, layout = self._encode(chats)
        cache = new_cache(self.model, self.method)
        watch = PrefillWatch(self.model, cache, layout)
        tokenizer = self.processor.tokenizer
        stops = {"stop_strings": how.stops, "tokenizer": tokenizer} if how.stops else {}
        generate: Any = self.model.generate
        tokens = generate(
            **inputs, **cache_argument(cache), **how.options, **stops, logits_processor=LogitsProcessorList([watch])
        )[:, inputs["input_ids"].shape[1] :]
        # A row that ended at a stop string goes on with padding.
        written = answered(tokens, self.model.generation_config.eos_token_id) & (tokens != tokenizer.pad_token_id)
        measure = watch.measure(written.sum(1).tolist(), self._token_bytes)
        return [how.cut(text) for text in texts(self.processor, self.model, tokens)], measure

    def _encode(self, chats: Sequence[Any]) -> tuple[BatchFeature, Layout]:
        conversations = [conversation(chat, self.processor) for chat in chats]
        options = load_videos(conversations, self.processor, self.arguments.num_frames, self.arguments.fps)
        try:
            inputs = encode(self.processor, conversations, self.model.dtype, options)
            spans = find_spans(self.model.config, inputs["input_ids"], inputs)
        except ValueError as error:
            raise InputError(f"the model's processor cannot take these questions: {error}") from error
        layout = Layout(spans, inputs["attention_mask"].bool())
        return inputs.to(self.model.device), layout

    def _name_unused(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._unused:
                self._unused.add(name)
                sys.stderr.write(
                    f"kvcapsule: the task's generation setting {name} is no option here and is not used.\n"
                )

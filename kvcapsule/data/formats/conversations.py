"""Chats: LLaVA's conversations, and messages as transformers and OpenAI have them. The first question of a row and its
answer are read; later turns are not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...errors import DataError
from ..places import IMAGE
from ..source_config import SourceConfig
from .base import Format, ParsedRow, has_keys, image_columns, items_of, text_of

_USER, _ASSISTANT = ("human", "user"), ("gpt", "assistant", "model")
_PLACE = "image"
"""Kinds of content that stand for an image contain this word: image, image_url, input_image."""


@dataclass(frozen=True)
class Llava(Format):
    """LLaVA: [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}]."""

    name = "llava"
    needs = "conversations: a list of {from, value}; image"
    role: ClassVar[str] = "from"
    content: ClassVar[str] = "value"
    column_names: ClassVar[tuple[str, ...]] = ("conversations", "conversation")
    images: tuple[str, ...]
    turns: str

    @classmethod
    def recognise(cls, columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Self | None:
        for name in (config.prompt, *cls.column_names):
            if name in columns and has_keys(first[name], (cls.role, cls.content)):
                return cls(image_columns(columns, config), name)
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.turns,)

    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        turns = items_of(row[self.turns], self.turns)
        roles = [str(turn.get(self.role)).lower() for turn in turns]
        place = next((i for i, role in enumerate(roles) if role in _USER), None)
        if place is None or place + 1 >= len(turns) or roles[place + 1] not in _ASSISTANT:
            raise DataError(
                f"the turns in {self.turns} are by {', '.join(roles)}: expected a user's turn (human, user) and then"
                " the answer (gpt, assistant)."
            )
        before = [self._text(turn, "system text", []) for turn in turns[:place]]
        within: list[Any] = []
        prompt = "\n\n".join([*before, self._text(turns[place], "prompt", within)])
        answer = self._text(turns[place + 1], "answer", [])
        questions = sum(role in _USER for role in roles)
        return ParsedRow(prompt, (answer,), images=tuple(within) or None, turns=questions)

    def _text(self, turn: Mapping[str, Any], what: str, within: list[Any]) -> str:
        """The text of a turn with <image> where images stand; those that lie within it are added to `within`."""
        return text_of(turn.get(self.content), what)


@dataclass(frozen=True)
class Messages(Llava):
    """Chat messages, whose content is a text or a list of texts and images:
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}, ...]."""

    name = "messages"
    needs = "messages: a list of {role, content}; images, unless they lie in the content"
    role = "role"
    content = "content"
    column_names = ("messages", "conversations", "conversation")

    def _text(self, turn: Mapping[str, Any], what: str, within: list[Any]) -> str:
        content = turn.get(self.content)
        if not isinstance(content, list):
            return text_of(content, what)
        parts, images = list[str](), list[Any]()
        for item in content:
            kind = str(item.get("type")) if isinstance(item, Mapping) else ""
            if _PLACE in kind:
                parts.append(IMAGE)
                images.append(_image(item))
            elif "text" in kind:
                parts.append(text_of(item.get("text"), what))
            else:
                raise DataError(f"the {what} holds a part that is neither text nor image: {str(item)[:60]}.")
        named = [image for image in images if image is not None]
        if len(named) not in (0, len(images)):
            raise DataError(f"{len(named)} of the {len(images)} images of the {what} are named: name all, or none.")
        within += named
        return text_of("\n".join(parts), what)


@dataclass(frozen=True)
class Cauldron(Format):
    """the_cauldron: [{"user": "What is this?", "assistant": "A cat.", "source": "..."}]."""

    name = "cauldron"
    needs = "texts: a list of {user, assistant}; images"
    images: tuple[str, ...]
    texts: str

    @classmethod
    def recognise(cls, columns: Sequence[str], first: Mapping[str, Any], config: SourceConfig) -> Self | None:
        for name in (config.prompt, "texts"):
            if name in columns and has_keys(first[name], ("user", "assistant")):
                return cls(image_columns(columns, config), name)
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.texts,)

    def read(self, row: Mapping[str, Any]) -> ParsedRow:
        turns = items_of(row[self.texts], self.texts)
        source = turns[0].get("source")
        prompt, answer = text_of(turns[0].get("user"), "prompt"), text_of(turns[0].get("assistant"), "answer")
        return ParsedRow(prompt, (answer,), task=source if isinstance(source, str) else None, turns=len(turns))


def _image(item: Mapping[str, Any]) -> Any:
    """The image that a part of a message names; None if it is only a place."""
    for key in ("image", "path", "url", "image_url"):
        value = item.get(key)
        if isinstance(value, Mapping) and "url" in value:
            value = value["url"]
        if value is not None:
            return value
    return None

"""The protocol ask-later: the prompt up to its last visual token is read and compressed once, then each of the
questions about it is asked on a copy of that cache.

What an answer is written from is compressed, its first token included, as in the second turn of a chat or behind an
image store. A policy that ranks visual tokens by the question sees none.
"""

import copy
from collections.abc import Iterator, Sequence
from functools import partial

import datasets
import torch
from rich.progress import Progress
from transformers import PreTrainedModel, ProcessorMixin
from transformers.cache_utils import Cache

from kvcapsule.data.batches import Question, read_question
from kvcapsule.data.row_digest import images_digest
from kvcapsule.errors import InputError
from kvcapsule.inference.transformers_api import cache_argument, last_logits_argument
from kvcapsule.methods.method import Method

from .block import Ask, Block, TimedRun
from .equal_bytes import Layout
from .image_groups import bundles, image_groups, runs
from .prefixes import CutPrompt, Prefixes, cut_prompts, encode_prefixes, questions_behind
from .shared_prefill import Prefill, replayable, replaying
from .watched_generate import Generated, generate, new_cache, recorded, stored_bytes

_ATTEND_AHEAD = {"paligemma"}
"""Types of models whose whole prompt attends to the whole prompt."""


class Part:
    """Questions that are answered together, each behind one of a block's prefixes."""

    def __init__(self, numbered: Sequence[tuple[int, CutPrompt]], prefixes: Prefixes, device: torch.device) -> None:
        """numbered: the number of its prefix, and the prompt."""
        rows = [row for row, _ in numbered]
        self.questions = [prompt.question for _, prompt in numbered]
        self.rows = None if rows == list(range(len(prefixes.lengths))) else torch.tensor(rows)
        """[Q] int64: the prefix of each question; None: each prefix is of one question, in their order."""
        spans, valid = prefixes.layout
        of_rows = [span._replace(row=i) for i, row in enumerate(rows) for span in spans if span.row == row]
        self.layout = Layout(of_rows, valid[rows])
        self.inputs = questions_behind([prompt for _, prompt in numbered], valid.shape[1], device)

    def cache(self, read: Cache) -> Cache:
        """A copy, for these questions, of a cache that has read the prefixes."""
        copied = copy.deepcopy(read)
        if self.rows is not None:
            copied.batch_select_indices(self.rows)
        return copied


class AskLater(Block):
    """Prefixes, and the questions behind each."""

    first_token_exact = False

    def __init__(
        self,
        groups: Sequence[Sequence[CutPrompt]],
        model: PreTrainedModel,
        processor: ProcessorMixin,
        size: int,
    ) -> None:
        """groups: prompts by their prefix, of which the first one's question has its images; size: of a part."""
        self.prefixes = encode_prefixes([group[0] for group in groups], model, processor)
        numbered = [(row, prompt) for row, group in enumerate(groups) for prompt in group]
        self._parts = [Part(part, self.prefixes, model.device) for part in runs(numbered, size)]
        self.prefill: Prefill | None = None

    @classmethod
    def of(cls, questions: list[Question], model: PreTrainedModel, processor: ProcessorMixin) -> "AskLater":
        """One block of these questions, each with a prefix of its own."""
        return cls([[prompt] for prompt in cut_prompts(questions, model, processor)], model, processor, len(questions))

    @classmethod
    def blocks(
        cls, rows: datasets.Dataset, model: PreTrainedModel, processor: ProcessorMixin, size: int, progress: Progress
    ) -> Iterator["AskLater"]:
        """All rows: questions about the same images side by side, and otherwise task by task. A block has up to `size`
        prefixes.

        Layers with a window count the padding between a prefix and its question, and those with linear attention read
        it: models that have such layers are asked one question at a time.

        Raises:
            DataError, InputError: see `batches`; for a prompt that ends with an image, and for a model whose image
                tokens attend to the question.
        """
        if model.config.model_type in _ATTEND_AHEAD:
            raise InputError(
                f"{model.config.model_type}: its image tokens attend to the question behind them, so they cannot be"
                " read before it. Choose --protocol ask-first."
            )
        size = size if replayable(model) else 1
        for indices in bundles(image_groups(rows, progress), size):
            groups: dict[tuple[int, ...], list[CutPrompt]] = {}
            for some in runs(indices, size):
                questions = [read_question(rows[i], i) for i in some]
                digests = [images_digest(question.images) for question in questions]
                for prompt, digest in zip(cut_prompts(questions, model, processor), digests, strict=True):
                    group = groups.setdefault((digest, *prompt.ids[: prompt.end].tolist()), [])
                    # The images of one question are enough.
                    kept = prompt.question._replace(images=[]) if group else prompt.question
                    group.append(prompt._replace(question=kept))
            for batch in runs(list(groups.values()), size):
                yield cls(batch, model, processor, size)

    @property
    def parts(self) -> Sequence[Sequence[Question]]:
        return [part.questions for part in self._parts]

    def record(self, model: PreTrainedModel, hidden: bool) -> None:
        self.prefill = recorded(model, hidden, partial(self._read, model))

    def asks(self, model: PreTrainedModel, method: Method | None) -> Iterator[Ask]:
        read = self._filled(model, method)
        for part in self._parts:
            yield partial(_ask, model, part, part.cache(read))

    def stored(self, model: PreTrainedModel, method: Method) -> int:
        read = self._filled(model, method)
        return sum(stored_bytes(part.cache(read), part.layout).total for part in self._parts)

    def timed_run(self, model: PreTrainedModel) -> TimedRun:
        return TimedRun(self._parts[0].inputs, partial(self._read, model))

    def _filled(self, model: PreTrainedModel, method: Method | None) -> Cache:
        """A cache of the method that has read the prefixes."""
        cache = new_cache(model, method)
        with replaying(model, self.prefill):
            self._read(model, cache)
        return cache

    @torch.no_grad()
    def _read(self, model: PreTrainedModel, cache: Cache) -> None:
        model(**self.prefixes.inputs, use_cache=True, **last_logits_argument(model), **cache_argument(cache))


def _ask(
    model: PreTrainedModel, part: Part, cache: Cache, max_new_tokens: int, forced: torch.Tensor | None = None
) -> Generated:
    """Ask the questions of a part on a copy of a cache that holds their prefixes. Bytes are those of the prefixes."""
    stored = stored_bytes(cache, part.layout)
    answered = generate(model, part.inputs, copy.deepcopy(cache), part.layout, max_new_tokens, forced)
    return answered._replace(stored=stored)

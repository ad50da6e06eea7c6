"""Questions read from a source one after the other, of which no more than a shuffle's buffer is in memory."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from ..errors import DataError
from .batches import read_question
from .formats import format_of
from .image_files import WITHIN
from .question_set import question_of
from .source_config import SourceConfig
from .streams import open_stream, shuffled

Row = dict[str, Any]


class QuestionStream:
    """At most `config.size` questions of a source: the first ones are held out, the others come epoch after epoch.

    Which they are depends on the options alone, so that every process of a run sees the same ones.
    """

    def __init__(self, config: SourceConfig, held_out: int) -> None:
        """Read the questions that are held out.

        Args:
            config: the options.
            held_out: how many.

        Raises:
            DataError: as `kvcapsule.data.source.load`.
        """
        self.config, self.held_out = config, held_out
        self._stream = open_stream(config)
        self._places = Counter[str]()
        first = next(self._stream.rows(), None)
        if first is None:
            raise DataError(f"{config.source} (split {config.split!r}) holds no rows.")
        self._format = format_of(tuple(first.values), first.values, config)
        self.first = list(islice(self._questions(), held_out))
        """Those that are held out."""

    def __len__(self) -> int:
        """The most of an epoch: there are fewer where the stream ends before."""
        return self.config.size - self.held_out

    def epoch(self, number: int) -> Iterator[Row]:
        """The questions behind those that are held out; from the second epoch on, in another order each."""
        rows = islice(self._questions(), self.held_out, None)
        return shuffled(rows, np.random.default_rng([self.config.seed, number])) if number else rows

    @property
    def description(self) -> str:
        """How the data are read, in a line."""
        columns = ", ".join((*self._format.columns, *self._format.images))
        places = " and ".join(self._places or [WITHIN])
        return f"read as: {self._format.name} ({columns}), {places}, a stream of {self.config.size:,} rows at most"

    def _questions(self) -> Iterator[Row]:
        """From the first on, in the order of the stream; where broken ones are skipped, their images are read."""
        number = 0
        for label, values in self._stream.rows():
            if number == self.config.size:
                return
            try:
                question = question_of(values, label, self._format, self.config, self._stream.folder, self._places)
                if self.config.skip_broken:
                    read_question(question, number)
            except DataError:
                if self.config.skip_broken:
                    continue
                raise
            yield {**question, "index": number}
            number += 1

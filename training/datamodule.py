"""Batches of questions with their answers, as a frozen VLM's inputs."""

from typing import Any

import datasets
import lightning as L
from torch.utils.data import DataLoader
from transformers import BatchFeature, ProcessorMixin

from kvcapsule.data.prompts import conversation, encode
from kvcapsule.data.source import images_of


class Questions(L.LightningDataModule):
    """Training and held-out rows of one source, each an image, a prompt and the right answer."""

    def __init__(self, rows: datasets.Dataset, held_out: datasets.Dataset, processor: ProcessorMixin, batch: int, workers: int = 0) -> None:
        super().__init__()
        self.rows, self.held_out, self.processor = rows, held_out, processor
        self.batch, self.workers = batch, workers

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.rows, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.held_out, shuffle=False)

    def collate(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """Left-padded inputs over prompt and answer."""
        return encode(self.processor, [conversation(images_of(row, row["index"]), row["prompt"], row["answer"]) for row in rows])

    def _loader(self, rows: datasets.Dataset, shuffle: bool) -> DataLoader[Any]:
        indexed = _Indexed(rows)
        return DataLoader(indexed, self.batch, shuffle=shuffle, collate_fn=self.collate, num_workers=self.workers)  # type: ignore[arg-type]


class _Indexed:
    """Rows that know their number, so that a bad one can be named."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i], "index": i}

"""Training stages of both test beds' VLMs: optimiser and schedule, numbered samples, and one fit that resumes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaForConditionalGeneration

IGNORE = -100
"""Label of tokens without a loss."""
Collate = Callable[[list[int]], Any]
"""Sample numbers to a batch."""


class Stage(L.LightningModule):
    """Trains a VLM's unfrozen parameters by AdamW with warm-up and cosine schedule."""

    warmup = 100
    """Steps over which the learning rate rises."""
    weight_decay = 0.02

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float) -> None:
        super().__init__()
        self.vlm = vlm
        # Sub-configurations of a LLaVA, whose types are those of the models inside.
        self.text_config: Any = vlm.config.text_config
        self.vision_config: Any = vlm.config.vision_config
        self.steps, self.lr = steps, lr

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimiser."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.groups(), lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """A linear rise, then a cosine to a fiftieth."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Numbers(Dataset[int]):
    """The sample numbers start .. start + length."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        return self.start + i


class NumberedSamples(L.LightningDataModule):
    """Samples numbered by epoch, so that a resumed run sees the same samples as an uninterrupted one."""

    def __init__(
        self, collate: Callable[[int], Collate], first: int, batch: int, steps: int, *, at_once: int, workers: int = 0
    ) -> None:
        """Samples from number `first` on.

        Args:
            collate: the collator of the epoch that begins at a step.
            first: number of the first sample.
            batch: samples of a step.
            steps: of an epoch.
            at_once: samples that a step takes at once; divides batch.
            workers: processes that prepare batches.
        """
        super().__init__()
        self.collate, self.first, self.batch, self.steps = collate, first, batch, steps
        self.at_once, self.workers = at_once, workers

    def train_dataloader(self) -> DataLoader[int]:
        assert self.trainer is not None
        step = self.trainer.current_epoch * self.steps
        numbers = Numbers(self.first + step * self.batch, self.steps * self.batch)
        return DataLoader(numbers, self.at_once, collate_fn=self.collate(step), num_workers=self.workers)


def fit(stage: Stage, data: NumberedSamples, work: Path, **options: Any) -> None:
    """Train a stage, from its last checkpoint if there is one.

    Args:
        stage: see there.
        data: its samples.
        work: folder of checkpoints and logs.
        options: of Lightning's Trainer; "logger" by default one log in `work`.
    """
    trainer = L.Trainer(
        default_root_dir=work,
        callbacks=[ModelCheckpoint(work, filename="{step}", save_last=True, every_n_epochs=1, save_top_k=1)],
        gradient_clip_val=1.0,
        reload_dataloaders_every_n_epochs=1,
        enable_model_summary=False,
        **{"logger": CSVLogger(work, name="log", version=""), **options},
    )
    last = work / "last.ckpt"
    trainer.fit(stage, datamodule=data, ckpt_path=last if last.exists() else None)

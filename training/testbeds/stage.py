"""Training stage of a test bed: a VLM under AdamW with warm-up and cosine schedule, and numbered training examples."""

import math

import lightning as L
import torch
from torch.utils.data import Dataset
from transformers import LlavaForConditionalGeneration


class Stage(L.LightningModule):
    """Base of the stages; subclasses add the training step, and may set other parameter groups."""

    warmup = 100
    """Steps of linear warm-up."""
    weight_decay = 0.02

    def __init__(self, vlm: LlavaForConditionalGeneration, steps: int, lr: float) -> None:
        super().__init__()
        self.vlm = vlm
        self.steps, self.lr = steps, lr

    def groups(self) -> list[dict[str, object]]:
        """Parameter groups of the optimiser; by default all unfrozen parameters."""
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.groups(), lr=self.lr, betas=(0.9, 0.98), weight_decay=self.weight_decay)

        def factor(step: int) -> float:
            if step < self.warmup:
                return (step + 1) / self.warmup
            done = (step - self.warmup) / max(1, self.steps - self.warmup)
            return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Indices(Dataset[int]):
    """The example numbers start .. start + length."""

    def __init__(self, start: int, length: int) -> None:
        self.start, self.length = start, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> int:
        return self.start + i

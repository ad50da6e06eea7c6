"""Progress of a training run on the screen."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar


class StepBar(RichProgressBar):
    """One bar over all steps, without the loggers' version numbers."""

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.max_steps)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

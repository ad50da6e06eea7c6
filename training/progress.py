"""Progress of a descent and of its measurement on the screen."""

from typing import Any

import lightning as L

from kvcapsule.cli.progress import Bar

from .capsule_fit import CapsuleFit


class StepBar(L.Callback):
    """One bar over all steps of a run, and one over the held-out batches."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module, "steps", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._bar is not None:
            shown = (
                f"{name.removeprefix('train/')} {value:.3g}" for name, value in trainer.progress_bar_metrics.items()
            )
            self._bar.update(trainer.global_step, ", ".join(shown))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module, "held-out batches", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.done + 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, fit: L.LightningModule, title: str, total: int, done: int = 0) -> None:
        assert isinstance(fit, CapsuleFit)
        self._bar = Bar(fit.task.console, title, total, done)

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None

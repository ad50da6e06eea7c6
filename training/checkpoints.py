"""Checkpoints of a descent: every so many steps, at the last one, and at an interrupt; each is whole."""

import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kvcapsule.errors import ConfigError

from .capsule_fit import CapsuleFit
from .run_state import write_whole

_EVERY_STEPS = 50
_EVERY_SECONDS = 60.0
"""Of a run in one process: the clocks of several would not agree on a step."""


class Checkpoints(L.Callback):
    """Writes `last.ckpt`, and refuses to go on with a loss that is no number.

    The first Ctrl-C of a run in one process ends it behind the step at hand, whose checkpoint is then written; the next
    one ends it at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved_at = time.monotonic()
        self._interrupted = False
        self._handler: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = time.monotonic()
        if trainer.world_size == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, lambda *_: self._interrupt(pl_module))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if not torch.isfinite(loss).all():
            raise diverged_error(pl_module, f"the loss of step {step} is {float(loss):g}")
        late = trainer.world_size == 1 and time.monotonic() - self._saved_at > _EVERY_SECONDS
        if step % _EVERY_STEPS == 0 or step == trainer.max_steps or late or self._interrupted:
            trainer.save_checkpoint(self.path)
            self._saved_at = time.monotonic()
        if self._interrupted:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release()

    def _interrupt(self, fit: L.LightningModule) -> None:
        assert isinstance(fit, CapsuleFit)
        self._interrupted = True
        self._release()
        fit.show("interrupted: the step at hand is finished and saved first; Ctrl-C again ends it at once.")

    def _release(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None


class WholeFiles(TorchCheckpointIO):
    """Writes checkpoints beside their place and renames them.

    Lightning's own way goes through the folder for temporary files, which may be of another file system: a process that
    is killed as the file is copied from there leaves half of one, and one that is killed before leaves it there.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_whole(checkpoint, Path(path))


def diverged_error(fit: L.LightningModule, what: str) -> ConfigError:
    """The error for a descent whose numbers are no longer finite.

    Args:
        fit: the module.
        what: where that was seen.
    """
    assert isinstance(fit, CapsuleFit)
    option = fit.rate_option
    lower = f"a lower --{option} than {_value(fit, option):g}" if option else "a lower learning rate"
    return ConfigError(f"training diverged: {what}. Nothing is saved; start again with {lower} and --force.")


def _value(fit: CapsuleFit[Any], option: str) -> float:
    value: Any = fit.task.recipe
    for name in option.split("."):
        value = getattr(value, name)
    return float(value)

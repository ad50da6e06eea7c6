"""Lightning's trainer as a run of `kvcapsule train` uses it: loggers, checkpoints, processes."""

import logging
import signal
import warnings
from collections.abc import Callable
from typing import TypeVar

import lightning as L
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only

from kvcapsule.cli.sizes import shown_bytes
from kvcapsule.vlm.placement import on_several_devices

from . import processes
from .capsule_fit import CapsuleFit
from .checkpoints import Checkpoints, WholeFiles
from .datamodule import Questions
from .output_folder import CSV_FOLDER, TENSORBOARD_FOLDER
from .progress import StepBar
from .recipe import FSDP, Recipe
from .run_state import DESCENT_FILE

AnyFit = CapsuleFit[Recipe]
T = TypeVar("T")
_NEVER = 10**9


def is_first_process() -> bool:
    """Whether this process is the only one or the first one of a run, as far as its environment says."""
    return getattr(rank_zero_only, "rank", 0) == 0


def run(recipe: Recipe, fit: AnyFit, data: Questions) -> dict[str, float]:
    """Train, then measure on the held-out questions.

    Returns:
        The measurements by name.

    Raises:
        KeyboardInterrupt: for Ctrl-C, once the loggers are closed.
    """
    trainer = L.Trainer(
        accelerator="cpu" if recipe.device == "cpu" else "auto",
        devices=recipe.trainer.devices,
        num_nodes=recipe.trainer.num_nodes,
        strategy=_strategy(recipe, fit),
        max_steps=fit.steps,
        max_epochs=-1,
        logger=[
            CSVLogger(recipe.work, name="", version=CSV_FOLDER),
            TensorBoardLogger(recipe.work, name="", version=TENSORBOARD_FOLDER),
        ],
        callbacks=[StepBar(), Checkpoints(recipe.work / DESCENT_FILE)],
        plugins=[WholeFiles()],
        enable_progress_bar=False,
        enable_checkpointing=False,
        log_every_n_steps=5,
        # Measured once, when training is over.
        val_check_interval=_NEVER,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=0,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    # A family in closed form is prepared by `validate`, which needs no gradients and wraps no module.
    if fit.steps:
        last = recipe.work / DESCENT_FILE
        resumed = last if recipe.resume and last.is_file() else None
        _interruptible(trainer, lambda: trainer.fit(fit, datamodule=data, ckpt_path=resumed, weights_only=True))
        fit.complete()
    (measured,) = _interruptible(trainer, lambda: trainer.validate(fit, datamodule=data, verbose=False))
    return dict(measured)


def _interruptible(trainer: L.Trainer, stage: Callable[[], T]) -> T:
    """A stage whose Ctrl-C is a KeyboardInterrupt; Lightning ends the process with exit code 1, and lets no further one
    through."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        return stage()
    except SystemExit as error:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


def exchanged_line(fit: AnyFit) -> str:
    """What each process of a run gave to the others; empty for one process."""
    if processes.count() == 1:
        return ""
    gradients = sum(p.numel() * p.element_size() for p in fit.parameters() if p.requires_grad)
    of_steps = f", and {shown_bytes(gradients)} of gradients in each of {fit.steps} steps" if fit.steps else ""
    return (
        f"{processes.count()} processes, each of which gave the others {shown_bytes(processes.EXCHANGED.bytes)} of sums"
        f" and samples{of_steps}."
    )


class BesideLayers(SingleDeviceStrategy):
    """For a model on several devices: each codec lies where the layers that it codes do."""

    def model_to_device(self) -> None:
        fit = self.lightning_module
        assert isinstance(fit, CapsuleFit)
        fit.move_beside_layers()


def _strategy(recipe: Recipe, fit: AnyFit) -> str | Strategy:
    """Lightning's strategy; DDP looks for parameters without a gradient where a fit has some."""
    wanted, model = recipe.trainer.strategy, fit.task.model
    if on_several_devices(model):
        return BesideLayers(model.device)
    if wanted in ("ddp", FSDP) or (wanted == "auto" and recipe.trainer.processes > 1):
        # Buffers are the same sums in all processes: they need not be sent at each step.
        return DDPStrategy(find_unused_parameters=fit.has_unused_parameters, broadcast_buffers=False)
    return wanted


def quiet() -> None:
    """Keep Lightning's advertisements and notes on its own internals from the user's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*number of training batches.*")
    # Questions begins a resumed run at its step.
    warnings.filterwarnings("ignore", message=r".*your dataloader is not resumable.*")

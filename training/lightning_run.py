"""Lightning's trainer as a run of `kvcapsule train` uses it: loggers, checkpoints, processes."""

import logging
import shutil
import warnings

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from .capsule_fit import CapsuleFit
from .datamodule import Questions
from .progress import StepBar
from .recipe import Recipe

AnyFit = CapsuleFit[Recipe]
_NEVER = 10**9
_CHECKPOINT_EVERY = 50
"""Steps between checkpoints."""


def run(recipe: Recipe, fit: AnyFit, data: Questions) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu" if recipe.device == "cpu" else "auto",
        devices=recipe.trainer.devices,
        num_nodes=recipe.trainer.num_nodes,
        strategy=_strategy(recipe, fit),
        max_steps=fit.steps,
        max_epochs=-1,
        logger=[
            CSVLogger(recipe.work, name="", version="csv"),
            TensorBoardLogger(recipe.work, name="", version="tensorboard"),
        ],
        callbacks=[
            ModelCheckpoint(
                recipe.work,
                save_last=True,
                save_top_k=0,
                every_n_train_steps=max(1, min(_CHECKPOINT_EVERY, fit.steps)),
                enable_version_counter=False,
            ),
            StepBar(),
        ],
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
    if not recipe.resume and trainer.is_global_zero:
        shutil.rmtree(recipe.work, ignore_errors=True)
    # A family in closed form is prepared by `validate`, which needs no gradients and wraps no module.
    if fit.steps:
        trainer.fit(fit, datamodule=data, ckpt_path=recipe.work / "last.ckpt" if recipe.resume else None)
        fit.finish()
    return trainer


def _strategy(recipe: Recipe, fit: AnyFit) -> str:
    """Lightning's strategy; DDP looks for parameters without a gradient where a fit has some."""
    wanted = recipe.trainer.strategy
    several = recipe.trainer.devices * recipe.trainer.num_nodes != 1
    plain = wanted == "ddp" or (wanted == "auto" and several)
    return "ddp_find_unused_parameters_true" if plain and fit.has_unused_parameters else wanted


def quiet() -> None:
    """Keep Lightning's advertisements and notes on its own internals from the user's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*number of training batches.*")

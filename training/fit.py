"""One training run, from recipe to capsule."""

import logging
import shutil
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from kvcapsule.capsule.base_model import commit_of, record_of
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import PACKAGE, CapsuleConfig
from kvcapsule.capsule.record import MODEL, portable
from kvcapsule.capsule.trained_with import record_of_data, write_places
from kvcapsule.capsule.write import require_replaceable
from kvcapsule.cli import session
from kvcapsule.cli.results import shown_path
from kvcapsule.codec import REGISTRY, CodecFamily
from kvcapsule.data import source
from kvcapsule.errors import ConfigError, DataError, GeometryError, InputError
from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers
from kvcapsule.vlm.loading import load_vlm
from kvcapsule.vlm.spans import find_spans

from .capsule_fit import CapsuleFit, Task
from .datamodule import Questions
from .families import fit_class
from .recipe import Recipe
from .saved_recipe import to_save

AnyFit = CapsuleFit[Recipe]
_NEVER = 10**9
_CHECKPOINT_EVERY = 50
"""Steps between checkpoints."""


def train(recipe: Recipe, console: Console | None = None) -> Capsule:
    """Train a capsule and save it to recipe.output.

    Raises:
        KVCapsuleError: before anything is trained, wherever that can be known.
    """
    console = console or Console(stderr=True)
    _quiet()
    output = Path(recipe.output)
    family = REGISTRY.find(recipe.family)
    _require_loadable(family, recipe.family, console)
    fit_of = fit_class(family)
    if not isinstance(recipe, fit_of.recipe_class):
        raise ConfigError(
            f"the family {family.name} takes a {fit_of.recipe_class.__name__}, not a {type(recipe).__name__}."
        )
    _check_output(recipe, output)
    session.begin(console, threads=recipe.threads, seed=recipe.seed, device=recipe.device)
    L.seed_everything(recipe.seed, verbose=False)
    started = time.perf_counter()
    model, processor = load_vlm(recipe.model, recipe.revision, recipe.dtype, recipe.device)
    geometry = KVGeometry.from_config(model.config)
    full = full_attention_layers(model.config)
    if len(full) != geometry.layers:
        raise GeometryError(
            f"{geometry.model_type}: {len(full)} of its {geometry.layers} layers have full attention, and training"
            " needs all to have it. Use a model without sliding-window or linear-attention layers."
        )
    rows = source.load(recipe.data)
    session.tell(console, rows.info.description)
    if len(rows) <= recipe.held_out:
        raise DataError(
            f"{len(rows)} questions cannot spare {recipe.held_out} to measure on: lower --held_out or give more data."
        )
    trained = len(rows) - recipe.held_out
    held_out = rows.select(range(trained, len(rows)))
    # Whole batches are cached on disk: those of later epochs are then the same ones.
    fixed = recipe.harvests is not None
    data = Questions(
        rows.select(range(trained)),
        held_out,
        processor,
        batch=recipe.batch,
        workers=recipe.workers,
        seed=recipe.seed,
        dtype=model.dtype,
        fixed=fixed,
    ).served(recipe.codec.align, recipe.words_before)
    fit = fit_of(
        Task(recipe, model, data, geometry, recipe.codec.tile or _whole_image(model, data, recipe.codec.align), console)
    )
    trainer = _run(recipe, fit, data)
    (measured,) = trainer.validate(fit, datamodule=data, verbose=False)
    capsule = _capsule(recipe, family, fit, geometry)
    if trainer.is_global_zero:
        seconds = time.perf_counter() - started
        metrics = {
            **{k.removeprefix("validation/"): v for k, v in measured.items()},
            "seconds": seconds,
            "questions": len(held_out),
        }
        capsule.save_pretrained(
            output,
            recipe=to_save(recipe),
            metrics={"train": metrics},
            card_name=shown_path(recipe.output),
            training_rows=data.rows_read.training_rows(),
        )
        write_places(output, recipe.model, recipe.data.source)
        console.print(_summary(metrics))
        console.print(f"capsule saved to {output} ({seconds:.0f} s)", highlight=False)
    return capsule


def _require_loadable(family: CodecFamily, given_as: str, console: Console) -> None:
    """Say where a capsule of this family can be loaded, if it is not known by its name here.

    Raises:
        ConfigError: if an entry point has another name than its family, so that no process could load the capsule.
    """
    if family.name in REGISTRY.names() and REGISTRY.find(family.name) is family:
        return
    if ":" not in given_as:
        raise ConfigError(
            f"--family {given_as}: the family's own name is {family.name!r}, and its capsule could not be loaded under"
            f" it. Give the entry point in the group {REGISTRY.group} the family's name."
        )
    console.print(
        f"The capsule can be loaded where an entry point in the group {REGISTRY.group} names {family.name!r}, or after"
        f" kvcapsule.codec.REGISTRY.add({family.name!r}, ...).",
        highlight=False,
    )


def _check_output(recipe: Recipe, output: Path) -> None:
    if output.exists() and not recipe.force and not recipe.resume:
        raise InputError(f"{output} exists: choose another --output, or replace it with --force true.")
    last = recipe.work / "last.ckpt"
    if recipe.resume and not last.is_file():
        raise InputError(f"nothing to resume: there is no {last}.")
    if output.exists():
        require_replaceable(output.resolve())


def _whole_image(model: PreTrainedModel, data: Questions, align: int) -> int:
    """Visual tokens of one image, where all images of a batch have equally many; those in whole blocks of `align`
    tokens wherever the image begins.

    Raises:
        DataError: where they differ: a whole-image map has one size. And where an image may hold no whole block.
    """
    batch = next(iter(data.val_dataloader()))
    lengths = sorted({span.length for span in find_spans(model.config, batch.inputs["input_ids"], batch.inputs)})
    if len(lengths) != 1:
        shown = f"images of {', '.join(map(str, lengths))} visual tokens" if lengths else "no image"
        raise DataError(
            f"a whole-image capsule needs images of one size, but a batch has {shown}: give a tile, as in"
            " --codec.tile 64."
        )
    tile = (lengths[0] - align + 1) // align * align
    if tile < 1:
        raise DataError(
            f"an image of {lengths[0]} visual tokens does not hold a whole block of {align} wherever it begins: choose"
            f" a --codec.align of at most {(lengths[0] + 1) // 2}."
        )
    return tile


def _run(recipe: Recipe, fit: AnyFit, data: Questions) -> L.Trainer:
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
            _Progress(),
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


class _Progress(RichProgressBar):
    """One bar over all steps, without the loggers' version numbers."""

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.max_steps)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


def _quiet() -> None:
    """Keep Lightning's advertisements and notes on its own internals from the user's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*number of training batches.*")


def _capsule(recipe: Recipe, family: CodecFamily, fit: AnyFit, geometry: KVGeometry) -> Capsule:
    package, model = REGISTRY.package_of(family.name), fit.task.model
    config = CapsuleConfig(
        family=family.name,
        # Where tiles begin is the recipe's, whatever the family.
        codec=replace(fit.codec_config(), align=recipe.codec.align),
        geometry=geometry,
        base_model=portable(recipe.model),
        base_revision=commit_of(model) or recipe.revision,
        metadata={
            **({} if package is None else {PACKAGE: package}),
            MODEL: record_of(recipe.model, model).to_dict(),
            **record_of_data(recipe.data),
        },
    )
    capsule = Capsule(config)
    for index, codec in enumerate(capsule.layers):
        codec.load_state_dict({k: v.cpu() for k, v in fit.codec(index).state_dict().items()})
    return capsule.eval().requires_grad_(False)


def _summary(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"on {metrics['questions']} held-out questions")
    for column in ("layer", "keys unexplained", "values unexplained", "attention output error"):
        table.add_column(column, justify="right")
    names = ("keys_unexplained", "values_unexplained", "output_error")
    layers = sorted({int(k.split("/")[0].removeprefix("layer")) for k in metrics if k.startswith("layer")})
    for title, under in (*((str(i), f"layer{i}/") for i in layers), ("mean", "")):
        table.add_row(title, *(f"{metrics[under + n]:.4f}" if under + n in metrics else "–" for n in names))
    return table

"""One training run, from recipe to capsule."""

import logging
import shutil
import time
import warnings
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel

from kvcapsule.capsule import Capsule, CapsuleConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig, retained
from kvcapsule.data import source
from kvcapsule.geometry import KVGeometry
from kvcapsule.models import load_vlm
from kvcapsule.spans import find_spans

from .datamodule import Questions
from .harvest import harvest
from .module import CapsuleFit, LayerFit
from .moments import TokenMoments
from .recipe import Recipe

_CHECKPOINT_EVERY = 50
"""Steps between checkpoints."""


def train(recipe: Recipe, console: Console | None = None) -> Capsule:
    """Train a capsule and save it to recipe.output.

    Raises:
        ValueError, ModelError, DataError, GeometryError, CapsuleError: before anything is trained, wherever that can be known.
    """
    console = console or Console(stderr=True)
    _quiet()
    output = Path(recipe.output)
    _check_output(recipe, output)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    L.seed_everything(recipe.seed, verbose=False)
    started = time.perf_counter()
    model, processor = load_vlm(recipe.model, recipe.revision, recipe.dtype, recipe.device)
    geometry = KVGeometry.from_config(model.config)
    rows = source.load(recipe.data)
    if len(rows) <= recipe.held_out:
        raise source.DataError(f"{len(rows)} questions cannot spare {recipe.held_out} to measure on: lower --held_out or give more data.")
    kept = len(rows) - recipe.held_out
    data = Questions(rows.select(range(kept)), rows.select(range(kept, len(rows))), processor, recipe.batch, recipe.workers)
    config = recipe.codec_config(geometry.layers, recipe.codec.tile or _whole_image(model, data))
    console.print(_derived(recipe, config, geometry))
    fit = CapsuleFit(model, config, geometry, _closed_form(recipe, model, data, config, geometry, console), recipe.optim)
    _run(recipe, fit, data)
    capsule = _capsule(recipe, fit, geometry, model)
    metrics = _measure(recipe, fit, data, time.perf_counter() - started)
    capsule.save_pretrained(output, recipe=asdict(recipe), metrics={"train": metrics})
    console.print(_summary(metrics))
    console.print(f"capsule saved to {output} ({metrics['seconds']:.0f} s)", highlight=False)
    return capsule


def _check_output(recipe: Recipe, output: Path) -> None:
    if output.exists() and not recipe.force and not recipe.resume:
        raise ValueError(f"{output} exists: choose another --output, or replace it with --force true.")
    last = recipe.work / "last.ckpt"
    if recipe.resume and not last.is_file():
        raise ValueError(f"nothing to resume: there is no {last}.")
    if not recipe.resume and recipe.work.exists():
        shutil.rmtree(recipe.work)


def _whole_image(model: PreTrainedModel, data: Questions) -> int:
    """Visual tokens of one image, where all images of a batch have equally many.

    Raises:
        ValueError: where they differ: a whole-image map has one size.
    """
    batch = next(iter(data.val_dataloader()))
    lengths = sorted({span.length for span in find_spans(model.config, batch["input_ids"], batch)})
    if len(lengths) != 1:
        found = f"images of {', '.join(map(str, lengths))} visual tokens" if lengths else "no image"
        raise ValueError(f"a whole-image capsule needs images of one size, but a batch has {found}: give a tile, as in --codec.tile 64.")
    return lengths[0]


def _closed_form(
    recipe: Recipe, model: PreTrainedModel, data: Questions, config: KVCapsuleConfig, geometry: KVGeometry, console: Console
) -> list[LayerFit]:
    """Moments over the first batches, and every layer's codecs solved from them. A resumed run takes them from its checkpoint."""
    moments = [TokenMoments(geometry.kv_heads, config.tile, geometry.head_dim).to(model.device) for _ in range(geometry.layers)]
    batches = 1 if recipe.resume else min(recipe.moment_batches, len(data.train_dataloader()))
    for batch in track(islice(data.train_dataloader(), batches), "moments of keys and values", total=batches, console=console):
        for moment, layer in zip(moments, harvest(model, batch, config.tile, config.canonical_frame), strict=True):
            moment.add(layer)
    return [LayerFit(config, geometry, i, moment, recipe.optim) for i, moment in enumerate(moments)]


def _run(recipe: Recipe, fit: CapsuleFit, data: Questions) -> None:
    steps = recipe.optim.soft_steps + recipe.optim.hard_steps
    trainer = L.Trainer(
        accelerator=_accelerator(recipe),
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        logger=[CSVLogger(recipe.work, name="", version="csv"), TensorBoardLogger(recipe.work, name="", version="tensorboard")],
        callbacks=[
            ModelCheckpoint(
                recipe.work, save_last=True, save_top_k=0, every_n_train_steps=min(_CHECKPOINT_EVERY, steps), enable_version_counter=False
            ),
            _Progress(),
        ],
        log_every_n_steps=5,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        enable_model_summary=False,
        gradient_clip_val=1.0,
    )
    trainer.fit(fit, datamodule=data, ckpt_path=recipe.work / "last.ckpt" if recipe.resume else None)
    if not fit.hardened:
        fit.harden()


class _Progress(RichProgressBar):
    """One bar over all steps, without the loggers' version numbers."""

    @property
    def total_train_batches(self) -> int:
        return int(self.trainer.max_steps)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}


def _accelerator(recipe: Recipe) -> str:
    return "cpu" if recipe.device == "cpu" else "auto"


def _quiet() -> None:
    """Keep Lightning's advertisements and notes on its own internals from the user's screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=r".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r".*number of training batches.*")


def _capsule(recipe: Recipe, fit: CapsuleFit, geometry: KVGeometry, model: PreTrainedModel) -> Capsule:
    config = CapsuleConfig(family="kvcapsule", codec=fit.config, geometry=geometry, base_model=recipe.model, base_revision=recipe.revision)
    capsule = Capsule(config)
    for own, trained in zip(capsule.layers, fit.layers, strict=True):
        assert isinstance(trained, LayerFit)
        own.load_state_dict({k: v.cpu() for k, v in trained.codec.state_dict().items()})
    return capsule.eval().requires_grad_(False)


def _measure(recipe: Recipe, fit: CapsuleFit, data: Questions, seconds: float) -> dict[str, Any]:
    """Reconstruction and attention-output error on the held-out questions."""
    trainer = L.Trainer(accelerator=_accelerator(recipe), devices=1, logger=False, enable_model_summary=False, enable_progress_bar=False)
    (measured,) = trainer.validate(fit, datamodule=data, verbose=False)
    found: dict[str, Any] = {name.removeprefix("validation/"): value for name, value in measured.items()}
    return {**found, "seconds": seconds, "questions": len(data.held_out)}


def _derived(recipe: Recipe, config: KVCapsuleConfig, geometry: KVGeometry) -> Table:
    keys, values = recipe.mean_ratios()
    table = Table(title=f"{recipe.model}: tiles of {config.tile} visual tokens, mean ratio keys {keys:.3f}, values {values:.3f}")
    for column in ("layer", "key rows", "value rows", "of", "stored less"):
        table.add_column(column, justify="right")
    for layer in range(geometry.layers):
        m_keys, m_values = retained(config.key_ratios[layer], config.tile), retained(config.value_ratios[layer], config.tile)
        table.add_row(str(layer), str(m_keys), str(m_values), str(config.tile), f"{2 * config.tile / (m_keys + m_values):.2f}x")
    return table


def _summary(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"on {metrics['questions']} held-out questions")
    for column in ("layer", "keys unexplained", "values unexplained", "attention output error"):
        table.add_column(column, justify="right")
    names = ("keys_unexplained", "values_unexplained", "output_error")
    layers = sorted({int(k.split("/")[0].removeprefix("layer")) for k in metrics if k.startswith("layer")})
    for layer in layers:
        table.add_row(str(layer), *(f"{metrics[f'layer{layer}/{n}']:.4f}" for n in names))
    table.add_row("mean", *(f"{metrics[n]:.4f}" for n in names))
    return table

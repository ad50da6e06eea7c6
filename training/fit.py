"""One training run, from recipe to capsule."""

import time
from dataclasses import asdict, replace
from pathlib import Path

import lightning as L
from rich.console import Console

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import PACKAGE, CapsuleConfig
from kvcapsule.cli import session
from kvcapsule.codec import REGISTRY, CodecFamily
from kvcapsule.data import source
from kvcapsule.errors import ConfigError, DataError, GeometryError
from kvcapsule.vlm.geometry import KVGeometry, full_attention_layers
from kvcapsule.vlm.loading import load_vlm

from .capsule_fit import Task
from .datamodule import Questions
from .families import fit_class
from .image_tokens import whole_image
from .lightning_run import AnyFit, quiet, run
from .output_folder import require_output
from .recipe import Recipe
from .summary import errors_table


def train(recipe: Recipe, console: Console | None = None) -> Capsule:
    """Train a capsule and save it to recipe.output.

    Raises:
        KVCapsuleError: before anything is trained, wherever that can be known.
    """
    console = console or Console(stderr=True)
    quiet()
    output = Path(recipe.output)
    family = REGISTRY.find(recipe.family)
    _require_loadable(family, recipe.family, console)
    fit_of = fit_class(family)
    if not isinstance(recipe, fit_of.recipe_class):
        raise ConfigError(
            f"the family {family.name} takes a {fit_of.recipe_class.__name__}, not a {type(recipe).__name__}."
        )
    require_output(recipe, output)
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
        Task(recipe, model, data, geometry, recipe.codec.tile or whole_image(model, data, recipe.codec.align), console)
    )
    trainer = run(recipe, fit, data)
    (measured,) = trainer.validate(fit, datamodule=data, verbose=False)
    capsule = _capsule(recipe, family, fit, geometry)
    if trainer.is_global_zero:
        seconds = time.perf_counter() - started
        metrics = {
            **{k.removeprefix("validation/"): v for k, v in measured.items()},
            "seconds": seconds,
            "questions": len(held_out),
        }
        capsule.save_pretrained(output, recipe=asdict(recipe), metrics={"train": metrics})
        console.print(errors_table(metrics))
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


def _capsule(recipe: Recipe, family: CodecFamily, fit: AnyFit, geometry: KVGeometry) -> Capsule:
    package = REGISTRY.package_of(family.name)
    config = CapsuleConfig(
        family=family.name,
        # Where tiles begin is the recipe's, whatever the family.
        codec=replace(fit.codec_config(), align=recipe.codec.align),
        geometry=geometry,
        base_model=recipe.model,
        base_revision=recipe.revision,
        metadata={} if package is None else {PACKAGE: package},
    )
    capsule = Capsule(config)
    for index, codec in enumerate(capsule.layers):
        codec.load_state_dict({k: v.cpu() for k, v in fit.codec(index).state_dict().items()})
    return capsule.eval().requires_grad_(False)

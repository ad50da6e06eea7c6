"""One training run, from recipe to capsule."""

import time
from dataclasses import replace
from typing import Any

import lightning as L
from rich.console import Console
from transformers import PreTrainedModel, ProcessorMixin

from kvcapsule.capsule.base_model import commit_of, record_of
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import LEAN_VERSION, PACKAGE, CapsuleConfig
from kvcapsule.capsule.local_names import portable
from kvcapsule.capsule.record import MODEL, ModelRecord
from kvcapsule.capsule.trained_with import record_of_data, write_places
from kvcapsule.cli import session
from kvcapsule.cli.results import shown_path
from kvcapsule.cli.tables import print_report
from kvcapsule.codec import REGISTRY, CodecFamily
from kvcapsule.data import source
from kvcapsule.errors import ConfigError
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from .answers import longest_sequence
from .checkpoints import diverged_error
from .datamodule import Questions, StreamedQuestions
from .families import fit_class
from .image_tokens import first_images, raw_tokens_line, tile_of
from .launch import own_device, require_processes
from .lightning_run import AnyFit, exchanged_line, is_first_process, quiet, run
from .output_folder import OutputFolder, output_folder
from .processes import EXCHANGED
from .recipe import Recipe
from .saved_recipe import saved_options
from .stored_size import stored_size
from .summary import errors_table, summary
from .task import Task


def train(recipe: Recipe, console: Console | None = None) -> Capsule:
    """Train a capsule and save it to recipe.output.

    Raises:
        KVCapsuleError: before anything is trained, wherever that can be known.
    """
    console = console or Console(stderr=True)
    quiet()
    family = REGISTRY.find(recipe.family)
    fit_of = fit_class(family)
    if not isinstance(recipe, fit_of.recipe_class):
        raise ConfigError(
            f"the family {family.name} takes a {fit_of.recipe_class.__name__}, not a {type(recipe).__name__}."
        )
    if not is_first_process():
        # The first process of the run looks after its folders and the screen.
        return _train(recipe, family, Console(quiet=True), None)
    _require_loadable(family, recipe.family, console)
    with output_folder(recipe) as folder:
        return _train(recipe, family, console, folder)


def _train(recipe: Recipe, family: CodecFamily, console: Console, folder: OutputFolder | None) -> Capsule:
    """folder: None in all processes but the first."""
    session.begin(console, threads=recipe.threads, seed=recipe.seed, device=recipe.device)
    L.seed_everything(recipe.seed, verbose=False)
    started = time.perf_counter()
    require_processes(recipe)
    EXCHANGED.begin()
    model, processor = load_vlm(recipe.model, recipe.revision, recipe.dtype, own_device(recipe))
    geometry = KVGeometry.from_config(model.config)
    data = _questions(recipe, processor, model, console)
    fit = _planned(recipe, family, model, data, console)
    if folder is not None:
        folder.start()
    # Before the model is moved, or shared out.
    record = record_of(recipe.model, model)
    measured = run(recipe, fit, data)
    if line := exchanged_line(fit):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    capsule = _capsule(recipe, family, fit, record)
    _require_finite(capsule, fit)
    # In every process, as none may hold the whole model.
    size = stored_size(capsule, model, next(iter(data.val_dataloader())).inputs, geometry)
    if folder is not None:
        seconds = time.perf_counter() - started
        metrics = {
            **{k.removeprefix("validation/"): v for k, v in measured.items()},
            "seconds": seconds,
            "questions": len(data.held_out),
            "compression": size.compression,
        }
        folder.require_unchanged()
        capsule.cpu().save_pretrained(
            folder.capsule,
            recipe=saved_options(recipe),
            metrics={"train": metrics},
            card_name=shown_path(str(folder.capsule)),
            training_rows=data.rows_read.training_rows(),
        )
        write_places(folder.capsule, recipe.model, recipe.data.source)
        folder.finish()
        print_report(errors_table(metrics), console=console)
        for line in summary(folder.capsule, metrics, size):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    return capsule


def _questions(recipe: Recipe, processor: ProcessorMixin, model: PreTrainedModel, console: Console) -> Questions:
    """The questions of a run, those of a stream read as they are needed."""
    options: dict[str, Any] = {
        "batch": recipe.batch,
        "workers": recipe.workers,
        "seed": recipe.seed,
        "dtype": model.dtype,
        # Whole batches are cached on disk: those of later epochs are then the same ones.
        "fixed": recipe.harvests is not None,
    }
    if recipe.data.streaming:
        size = recipe.data.size
        stream = source.stream(recipe.data, size - recipe.trained_of(size))
        session.tell(console, stream.description)
        data: Questions = StreamedQuestions(stream, processor, **options)
    else:
        rows = source.load(recipe.data)
        session.tell(console, rows.info.description)
        trained = recipe.trained_of(len(rows))
        data = Questions(rows.select(range(trained)), rows.select(range(trained, len(rows))), processor, **options)
    return data.served(recipe.codec.align, recipe.words_before, longest_sequence(model.config))


def _planned(recipe: Recipe, family: CodecFamily, model: PreTrainedModel, data: Questions, console: Console) -> AnyFit:
    """The fit of a run, after the checks that need no forward of the model."""
    images = first_images(model, data)
    tile = tile_of(images, recipe.codec.tile, recipe.codec.align)
    task = Task(recipe, model, data, KVGeometry.from_config(model.config), tile, images.a_question, console)
    fit: AnyFit = fit_class(family)(task)
    _ = fit.harvests  # Their folder is made now, or the run is refused.
    questions = min(recipe.moment_batches, data.epoch_steps) * min(recipe.batch, data.count)
    fit.require_feasible(images.most_tiles(tile, questions))
    if line := raw_tokens_line(images, tile, recipe.compression, model.dtype.itemsize * 8):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return fit


def _require_finite(capsule: Capsule, fit: AnyFit) -> None:
    """Raises ConfigError if a tensor of the capsule holds what is no number, as after a descent that diverged."""
    for name, tensor in capsule.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise diverged_error(fit, f"{name} holds numbers that are not finite")


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


def _capsule(recipe: Recipe, family: CodecFamily, fit: AnyFit, record: ModelRecord) -> Capsule:
    package, model = REGISTRY.package_of(family.name), fit.task.model
    config = CapsuleConfig(
        family=family.name,
        # Where tiles begin is the recipe's, whatever the family.
        codec=replace(fit.codec_config(), align=recipe.codec.align),
        geometry=fit.task.geometry,
        base_model=portable(recipe.model),
        base_revision=commit_of(model) or recipe.revision,
        format_version=LEAN_VERSION,
        metadata={
            **({} if package is None else {PACKAGE: package}),
            MODEL: record.to_dict(),
            **record_of_data(recipe.data),
        },
    )
    capsule = Capsule(config)
    for index, codec in enumerate(capsule.layers):
        codec.load_state_dict({k: v.cpu() for k, v in fit.codec(index).state_dict().items()})
    return capsule.eval().requires_grad_(False)

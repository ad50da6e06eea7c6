"""What the page about a capsule says: gathered from its folder, and from the model that it is for."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from rich.console import Console

from kvcapsule.capsule.measured import ROW_KEYS, evaluation_fault
from kvcapsule.capsule.overview import Overview, overview
from kvcapsule.capsule.read import METRICS_FILE
from kvcapsule.cli import session
from kvcapsule.cli.model_check import checked_models
from kvcapsule.cli.progress import Stages
from kvcapsule.data import source
from kvcapsule.data.batches import encode_questions, read_question
from kvcapsule.environment import versions
from kvcapsule.errors import DataError, InputError
from kvcapsule.vlm.geometry import KVGeometry
from kvcapsule.vlm.loading import load_vlm

from ..eval_config import EvalConfig
from ..quality import Answering
from ..run import named
from ..scores.scorer import Scorer
from ..seen import seen_shares
from ..shared_prefill import replayable
from .examples import Example, answered_examples, chosen_rows
from .page_config import PageConfig
from .token_loss import TokenLoss, token_loss
from .training_curves import Curve, training_curves

_MAPS = 2
"""Examples whose images are shown with what is lost of each token."""


@dataclass(frozen=True)
class PageContent:
    """All that the page shows."""

    capsule: Overview
    evaluation: dict[str, Any]
    """The object that docs/eval-json.md describes; empty: nothing was measured."""
    examples: Sequence[Example]
    losses: Sequence[tuple[Example, TokenLoss]]
    curves: Sequence[Curve]
    """Of the training run; empty where its log is not on this machine."""
    trained_on: float | None
    """Share of the examples that the capsule was trained on; None where it does not record its training rows."""
    protocol: str
    versions: dict[str, str]


def gather(name: str, config: PageConfig, console: Console) -> PageContent:
    """Read what is known of a capsule, and let the model answer the examples.

    Raises:
        KVCapsuleError: for a capsule, a model, data or an evaluation that cannot be used.
    """
    session.begin(console, threads=config.threads, seed=config.seed, device=config.device)
    capsule = overview(name)
    evaluation = saved_evaluation(capsule) if config.evaluation is None else read_evaluation(config.evaluation, capsule)
    capsule = replace(capsule, metrics={**capsule.metrics, "eval": evaluation})
    methods = EvalConfig(
        model=config.model, capsule=[name], data=config.data, protocol=config.protocol, batch=1, timing=False
    )
    participants = named(methods)
    with console.status("loading the model and the questions"):
        model, processor = load_vlm(config.model, config.revision, config.dtype, config.device)
        geometry = KVGeometry.from_config(model.config)
        for _, loaded in participants.capsules.values():
            loaded.require_geometry(geometry)
            loaded.to(model.device)
        rows = source.load(config.data)
    if len(rows) == 0:
        raise DataError(f"{config.data.source} (split {config.data.split!r}) holds no questions.")
    session.tell(console, rows.info.description)
    rows = chosen_rows(rows, config.examples)
    (trained_on,) = seen_shares(participants.capsules, rows, True, console).values()
    answering = Answering(
        1, config.max_new_tokens, Scorer(config.metric, config.data.source), replayable(model), config.protocol
    )
    ((_, loaded),) = participants.capsules.values()
    with (
        checked_models(participants.capsules.values(), model, False, console),
        Stages(console) as progress,
    ):
        entries = participants.entries(model, processor, rows, progress)
        examples = list(answered_examples(model, processor, rows, entries, answering, progress))
        losses = []
        for i in progress.track(range(min(_MAPS, len(rows))), description="measuring what is lost of each token"):
            inputs, _ = encode_questions([read_question(rows[i], i)], model, processor)
            if (loss := token_loss(model, loaded, inputs)) is not None:
                losses.append((examples[i], loss))
    return PageContent(
        capsule,
        evaluation,
        examples,
        losses,
        training_curves(capsule.folder),
        trained_on,
        config.protocol,
        versions(),
    )


def saved_evaluation(capsule: Overview) -> dict[str, Any]:
    """The evaluation that was saved with a capsule; empty: there is none.

    Raises:
        InputError: if it lacks what the page shows.
    """
    fault = evaluation_fault(capsule.evaluation, ROW_KEYS)
    if fault is not None:
        raise InputError(
            f"the evaluation in {capsule.folder / METRICS_FILE} cannot be shown ({fault}): measure again, with"
            " `kvcapsule eval --save-metrics true`."
        )
    return capsule.evaluation


def read_evaluation(file: str, capsule: Overview) -> dict[str, Any]:
    """The object of a `kvcapsule eval` with a capsule.

    Raises:
        InputError: if the file cannot be read, is another one, or is of other capsules.
    """
    path, advice = Path(file), "name a JSON file of `kvcapsule eval --json`"
    try:
        values = json.loads(path.expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): {advice}.") from error
    fault = evaluation_fault(values, ROW_KEYS) or (None if values.get("rows") else "it has no rows of methods")
    if fault is not None:
        raise InputError(f"{path} cannot be shown ({fault}): {advice}.")
    evaluation: dict[str, Any] = values
    of = dict.fromkeys(PurePath(str(row["settings"].get("capsule", ""))).name for row in evaluation["rows"])
    names = [name for name in of if name]
    if not {PurePath(capsule.name).name, capsule.folder.resolve().name} & set(names):
        measured = f"it measured {', '.join(names)}" if names else "it measured no capsule"
        raise InputError(
            f"{path} is not of {capsule.name} ({measured}): name the JSON of `kvcapsule eval --capsule {capsule.name}"
            " --json`."
        )
    return evaluation

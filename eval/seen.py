"""Whether a run asks what a capsule was trained on: it is said, and refused above a share."""

from typing import NamedTuple

import datasets
from rich.console import Console

from kvcapsule.capsule import hub
from kvcapsule.capsule.training_rows import Seen, TrainingRows
from kvcapsule.cli.progress import tracked
from kvcapsule.data.batches import question_batches
from kvcapsule.data.row_digest import row_digest
from kvcapsule.errors import InputError

from .suite.entries import Capsules

MOST_SEEN = 1 / 20
"""Share of the questions up to which a run goes on."""
_BATCH = 16


class _Capsule(NamedTuple):
    """A capsule that records its training rows."""

    row: str
    """The name of its row in the run."""
    place: str
    rows: TrainingRows


def seen_shares(
    capsules: Capsules, questions: datasets.Dataset, allowed: bool, console: Console
) -> dict[str, float | None]:
    """Say how many of the questions each capsule was trained on.

    Args:
        capsules: by row, the name and the capsule.
        questions: of the run.
        allowed: go on whatever the share is.
        console: for the lines and the progress.

    Returns:
        The share by row; None where a capsule does not record its training rows.

    Raises:
        InputError: above MOST_SEEN, unless that is allowed.
    """
    recorded = [
        _Capsule(row, place, rows)
        for row, (place, _) in capsules.items()
        if (rows := TrainingRows.in_folder(hub.find(place))) is not None
    ]
    shares: dict[str, float | None] = dict.fromkeys(capsules)
    if not recorded:
        return shares
    count = -(-len(questions) // _BATCH)
    batches = tracked(question_batches(questions, _BATCH), "comparing the questions with training rows", count, console)
    digests = [row_digest(question) for batch in batches for question in batch]
    for row, place, rows in recorded:
        seen = rows.seen(digests)
        shares[row] = seen.share
        line = _line(place, seen, len(questions))
        if (seen.share or 0) > MOST_SEEN and not allowed:
            raise InputError(
                f"{line}: more than one in twenty, so the result would not say how it answers others. Choose another"
                " --data.split or --data.source, or measure all the same with --allow-seen true."
            )
        console.print(f"{line}.", highlight=False, markup=False, soft_wrap=True)
    return shares


def _line(place: str, seen: Seen, questions: int) -> str:
    of = f"{questions} questions" if seen.rows == questions else f"{seen.rows} of the {questions} questions, drawn by"
    of += "" if seen.rows == questions else " digest,"
    return f"{seen.seen} of {of} were among those that {place} was trained on"

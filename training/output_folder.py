"""The output folder of a run: what may be replaced there."""

from pathlib import Path

from kvcapsule.capsule.write import require_replaceable
from kvcapsule.errors import InputError

from .recipe import Recipe


def require_output(recipe: Recipe, output: Path) -> None:
    """Raises InputError if the output folder is not one that this run may write."""
    if output.exists() and not recipe.force and not recipe.resume:
        raise InputError(f"{output} exists: choose another --output, or replace it with --force true.")
    last = recipe.work / "last.ckpt"
    if recipe.resume and not last.is_file():
        raise InputError(f"nothing to resume: there is no {last}.")
    if output.exists():
        require_replaceable(output.resolve())

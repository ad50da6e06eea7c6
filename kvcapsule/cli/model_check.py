"""Commands say in one line which capsules are of another model than the one that they run."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import ModelMismatchWarning

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from ..capsule.capsule import Capsule


@contextmanager
def checked_models(
    capsules: "Iterable[tuple[str, Capsule]]", model: "PreTrainedModel", strict: bool, console: "Console"
) -> Iterator[None]:
    """A block in which `attach` does not warn of these capsules: it is said here, once.

    Args:
        capsules: with their names.
        model: that they are used with.
        strict: refuse a capsule of another model.
        console: for the lines.

    Raises:
        CapsuleError: with strict, for a capsule of another model, and for one of which that cannot be known.
    """
    for name, capsule in capsules:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", ModelMismatchWarning)
            capsule.check_model(model, strict)
        for warning in noted:
            line = f"warning: {name}: {warning.message}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ModelMismatchWarning)
        yield

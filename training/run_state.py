"""What a run keeps to be resumed from: its closed form, written once, and the checkpoints of its descent."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvcapsule.atomic_files import replacing
from kvcapsule.errors import InputError

CLOSED_FORM_FILE, DESCENT_FILE = "closed-form.ckpt", "last.ckpt"
_KEYS = {
    CLOSED_FORM_FILE: {"config", "layers", "rows"},
    DESCENT_FILE: {"state_dict", "global_step", "loops", "optimizer_states"},
}
"""What each file must hold."""


def save_closed_form(work: Path, config: dict[str, Any], layers: dict[str, torch.Tensor], rows: Sequence[int]) -> None:
    """Write what a family's closed form gave, whole or not at all.

    Args:
        work: folder of the run.
        config: settings of the codecs.
        layers: tensors of the fit's layers by name.
        rows: digests of the rows that were read for it.
    """
    write_whole({"config": config, "layers": layers, "rows": list(rows)}, work / CLOSED_FORM_FILE)


def write_whole(state: dict[str, Any], path: Path) -> None:
    """Write what `torch.save` makes of a state, whole or not at all.

    Raises:
        OSError: if the file cannot be written. `torch.save` to a file says of a full disk only that a position is
            unexpected, in a RuntimeError.
    """
    content = io.BytesIO()
    torch.save(state, content)
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def load_closed_form(work: Path) -> dict[str, Any] | None:
    """The "config", the "layers" and the "rows" that `save_closed_form` wrote; None where it was not reached.

    Raises:
        InputError: if the file is damaged.
    """
    path = work / CLOSED_FORM_FILE
    return _load(path) if path.is_file() else None


def require_intact(work: Path) -> None:
    """Raises InputError if a file to resume from is damaged."""
    for name in (CLOSED_FORM_FILE, DESCENT_FILE):
        if (work / name).is_file():
            _load(work / name)


def _load(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Whatever unpickling meets in a damaged file.
        raise _damaged(path) from error
    if not isinstance(state, dict) or not state.keys() >= _KEYS[path.name]:
        raise _damaged(path)
    return state


def _damaged(path: Path) -> InputError:
    return InputError(
        f"{path} is damaged: delete it to resume from what else is there, or start again with --force in place of"
        " --resume."
    )

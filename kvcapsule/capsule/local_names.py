"""Names of models and data sources: those that are places on this machine, and what is written of these."""

from pathlib import Path

from kvcapsule.checkpoints import shipped


def is_local(name: str) -> bool:
    """Whether a model or data source is named by a path on this machine, rather than by a shipped name or Hub id."""
    path = Path(name).expanduser()
    return shipped(name) is None and (path.exists() or path.is_absolute())


def portable(name: str) -> str:
    """A name without this machine's folders: of a path the last part."""
    return Path(name).expanduser().resolve().name if is_local(name) else name

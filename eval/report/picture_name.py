"""Names of pictures, checked before a run; nothing is drawn here."""

from pathlib import Path

from kvcapsule.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")


def require_picture_name(name: str | None) -> None:
    """Refuse a --plot whose suffix names no format; None is no picture.

    Raises:
        ConfigError: saying which there are.
    """
    if name is not None and Path(name).suffix not in SUFFIXES:
        raise ConfigError(f"--plot {name}: a picture's name ends in {', '.join(SUFFIXES)}.")

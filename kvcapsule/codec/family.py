"""A codec family: the config that builds its codecs, and the class that trains them."""

from dataclasses import dataclass

from .base import CodecConfig


@dataclass(frozen=True)
class CodecFamily:
    """A kind of codec under its name."""

    name: str
    """Of the family, in capsules and on the command line."""
    config: type[CodecConfig]
    """The frozen dataclass whose `build` makes the codecs of a layer."""
    fit: str | None = None
    """"module:Class" of the kvcapsule.training.capsule_fit.CapsuleFit that trains it, imported when a capsule is
    trained; None: it has nothing to train."""

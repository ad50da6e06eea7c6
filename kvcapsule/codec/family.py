"""A codec family: the config that builds its codecs, the class that trains them, and the options of its training."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import CodecConfig


class CodecFamily:
    """A kind of codec under its name. What is named as "module:Class" is imported when it is used."""

    def __init__(
        self, name: str, config: "type[CodecConfig] | str", fit: str | None = None, recipe: str | None = None
    ) -> None:
        """A family.

        Args:
            name: of the family, in capsules and on the command line.
            config: the frozen dataclass whose `build` makes the codecs of a layer, or "module:Class".
            fit: "module:Class" of the kvcapsule.training.capsule_fit.CapsuleFit that trains it; None: it has nothing to
                train.
            recipe: "module:Class" of the fit's `recipe_class`, in a module that imports no torch, so that the help of
                `kvcapsule train` does not wait for it; None: the fit is imported for it.
        """
        self.name, self.fit, self.recipe = name, fit, recipe
        self._config = config

    @property
    def config(self) -> "type[CodecConfig]":
        """The class of its config."""
        if isinstance(self._config, str):
            module, _, name = self._config.partition(":")
            loaded: type[CodecConfig] = getattr(import_module(module), name)
            self._config = loaded
        return self._config

    def __repr__(self) -> str:
        return f"CodecFamily({self.name!r})"

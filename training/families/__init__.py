"""Training of each codec family: the fit, with its options, that its entry in kvcapsule.codec.FAMILIES names."""

from importlib import import_module
from typing import Any

from kvcapsule.codec import FAMILIES, REGISTRY, CodecFamily
from kvcapsule.errors import ConfigError

from ..capsule_fit import CapsuleFit
from ..recipe import Recipe


def trainable() -> list[str]:
    """kvcapsule's own families that can be trained."""
    return [name for name, family in FAMILIES.items() if family.fit is not None]


def fit_class(family: CodecFamily) -> type[CapsuleFit[Any]]:
    """The class that trains a family.

    Raises:
        ConfigError: if it has nothing to train, or its class cannot be imported.
    """
    if family.fit is None:
        raise ConfigError(f"--family {family.name!r} has nothing to train: choose one of {', '.join(trainable())}.")
    module, _, name = family.fit.partition(":")
    try:
        fit = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        if family in FAMILIES.values():
            raise
        raise ConfigError(f"--family {family.name}: its training {family.fit} cannot be imported ({error}).") from error
    if not (isinstance(fit, type) and issubclass(fit, CapsuleFit)):
        raise ConfigError(f"--family {family.name}: {family.fit} is no subclass of kvcapsule's CapsuleFit.")
    return fit


def recipe_class(family: str) -> type[Recipe]:
    """The options of a family, given by its registered name or as module:ATTRIBUTE.

    Raises:
        ConfigError: if there is no such family or it has nothing to train.
    """
    return fit_class(REGISTRY.find(family)).recipe_class

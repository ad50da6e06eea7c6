"""Training of each codec family: the fit, with its options, that its entry in kvcapsule.codec.FAMILIES names."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvcapsule.codec import FAMILIES, REGISTRY, CodecFamily
from kvcapsule.errors import ConfigError

from ..recipe import Recipe

if TYPE_CHECKING:
    from ..capsule_fit import CapsuleFit


def trainable() -> list[str]:
    """kvcapsule's own families that can be trained."""
    return [name for name, family in FAMILIES.items() if family.fit is not None]


def fit_class(family: CodecFamily) -> "type[CapsuleFit[Any]]":
    """The class that trains a family.

    Raises:
        ConfigError: if it has nothing to train, or its class cannot be imported.
    """
    from ..capsule_fit import CapsuleFit

    fit = _imported(family, _require_fit(family))
    if not (isinstance(fit, type) and issubclass(fit, CapsuleFit)):
        raise ConfigError(f"--family {family.name}: {family.fit} is no subclass of kvcapsule's CapsuleFit.")
    return fit


def recipe_class(family: str) -> type[Recipe]:
    """The options of a family, given by its registered name or as module:ATTRIBUTE; where the family names their class,
    its fit is not imported.

    Raises:
        ConfigError: if there is no such family, it has nothing to train, or their class cannot be imported.
    """
    registered = REGISTRY.find(family)
    _require_fit(registered)
    if registered.recipe is None:
        return fit_class(registered).recipe_class
    recipe = _imported(registered, registered.recipe)
    if not (isinstance(recipe, type) and issubclass(recipe, Recipe)):
        raise ConfigError(f"--family {registered.name}: {registered.recipe} is no subclass of kvcapsule's Recipe.")
    return recipe


def _require_fit(family: CodecFamily) -> str:
    if family.fit is None:
        raise ConfigError(f"--family {family.name!r} has nothing to train: choose one of {', '.join(trainable())}.")
    return family.fit


def _imported(family: CodecFamily, path: str) -> Any:
    """What "module:Class" names, of the training of a family."""
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        if family in FAMILIES.values():
            raise
        raise ConfigError(f"--family {family.name}: its training {path} cannot be imported ({error}).") from error

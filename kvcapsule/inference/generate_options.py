"""Options of a call of generate, wherever they stand."""

from typing import Any

from transformers import PreTrainedModel


def option(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An option of this call of generate: its own, then that of its generation config, then that of the model's."""
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    options = (kwargs.get(name), getattr(config, name, None), getattr(model.generation_config, name, None))
    return next((option for option in options if option is not None), None)

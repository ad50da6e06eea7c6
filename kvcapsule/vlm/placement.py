"""Where the weights of a model lie."""

from transformers import PreTrainedModel


def on_several_devices(model: PreTrainedModel) -> bool:
    """Whether accelerate's device_map put a model's layers on several devices, or some off the device that runs
    them."""
    return len(set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))) > 1

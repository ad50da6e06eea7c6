"""Shipped weights of smol-vlm: the connector and the language model's LoRA, which `make smol-vlm` loads into the two
pretrained parts."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from .language import SmolError

CONNECTOR = "connector.safetensors"
LORA = "lora"
_PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


def add_lora(vlm: LlavaForConditionalGeneration, rank: int) -> PeftModel:
    """Add a LoRA to every projection of the language model, in place; the returned PeftModel can save it."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model.*\.({_PROJECTIONS})")
    return get_peft_model(vlm, config)


def save_trained(vlm: LlavaForConditionalGeneration, lora: PeftModel | None, output: Path) -> None:
    """Write the connector and the LoRA in float16."""
    output.mkdir(parents=True, exist_ok=True)
    connector = vlm.model.multi_modal_projector.state_dict()
    save_file({name: tensor.half().contiguous() for name, tensor in connector.items()}, output / CONNECTOR)
    if lora is not None:
        lora.save_pretrained(str(output / LORA))
        (output / LORA / "README.md").unlink(missing_ok=True)
        path = output / LORA / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


def require_trained(trained: Path) -> Path:
    """Path of the trained connector.

    Raises:
        SmolError: if it does not exist.
    """
    path = trained / CONNECTOR
    if not path.exists():
        raise SmolError(f"{trained} has no {CONNECTOR}: train it with `make smol-vlm-training`.")
    return path


def load_trained(vlm: LlavaForConditionalGeneration, trained: Path) -> LlavaForConditionalGeneration:
    """Load the trained connector into the VLM, and merge the LoRA into its weights if there is one.

    Raises:
        SmolError: if there is no connector, or its shapes do not fit the model.
    """
    path = require_trained(trained)
    connector = {name: tensor.float() for name, tensor in load_file(path).items()}
    expected = {name: tuple(p.shape) for name, p in vlm.model.multi_modal_projector.state_dict().items()}
    actual = {name: tuple(p.shape) for name, p in connector.items()}
    if actual != expected:
        raise SmolError(f"{path} is for another model: it has {actual}, expected {expected}.")
    vlm.model.multi_modal_projector.load_state_dict(connector)
    if (trained / LORA).exists():
        with torch.no_grad():
            vlm = PeftModel.from_pretrained(vlm, str(trained / LORA)).merge_and_unload()
    return vlm

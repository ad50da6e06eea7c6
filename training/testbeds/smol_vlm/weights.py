"""What smol-vlm ships: the connector and the language model's LoRA, which `make smol-vlm` puts onto the two pretrained
halves."""

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
    """A LoRA in every projection of the language model; the VLM itself changes, the result saves it."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=rf".*language_model.*\.({_PROJECTIONS})")
    return get_peft_model(vlm, config)


def save_trained(vlm: LlavaForConditionalGeneration, lora: PeftModel | None, output: Path) -> None:
    """Write the connector and the LoRA in float16."""
    output.mkdir(parents=True, exist_ok=True)
    connector = vlm.model.multi_modal_projector.state_dict()
    save_file({name: tensor.half().contiguous() for name, tensor in connector.items()}, output / CONNECTOR)
    if lora is not None:
        lora.save_pretrained(output / LORA)
        (output / LORA / "README.md").unlink(missing_ok=True)
        held = output / LORA / "adapter_model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(held).items()}, held)


def require_trained(trained: Path) -> Path:
    """The file with the connector.

    Raises:
        SmolError: if there is none.
    """
    held = trained / CONNECTOR
    if not held.exists():
        raise SmolError(f"{trained} has no {CONNECTOR}: train it with `make smol-vlm-training`.")
    return held


def put_on(vlm: LlavaForConditionalGeneration, trained: Path) -> LlavaForConditionalGeneration:
    """The VLM with a trained connector, and with the LoRA merged into its weights where there is one.

    Raises:
        SmolError: if there is no connector, or it belongs to a model of other sizes.
    """
    held = require_trained(trained)
    connector = {name: tensor.float() for name, tensor in load_file(held).items()}
    expected = {name: tuple(p.shape) for name, p in vlm.model.multi_modal_projector.state_dict().items()}
    found = {name: tuple(p.shape) for name, p in connector.items()}
    if found != expected:
        raise SmolError(f"{held} is for another model: it has {found}, expected {expected}.")
    vlm.model.multi_modal_projector.load_state_dict(connector)
    if (trained / LORA).exists():
        with torch.no_grad():
            vlm = PeftModel.from_pretrained(vlm, str(trained / LORA)).merge_and_unload()
    return vlm

"""The model's rotary embedding without the model: cos and sin of any positions."""

from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from ..errors import ModelError
from ..inference.transformers_api import rotation_per_token


class RotaryEmbedding:
    """The rotary module of a VLM's language part, made from its config alone."""

    def __init__(self, config: Any) -> None:
        """Raises ModelError for a model whose rotary module cannot be made by itself."""
        self.text = config.get_text_config(decoder=True)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        modules = [m for name, m in model.get_decoder().named_modules() if name.rpartition(".")[2] == "rotary_emb"]
        if not modules:
            raise ModelError(f"{config.model_type}: its language part has no rotary embedding that could be found.")
        self.module = type(modules[0])(config=getattr(modules[0], "config", self.text))
        self.axes = 3 if (getattr(self.text, "rope_parameters", None) or {}).get("mrope_section") else 1
        """Axes of a position: 3 (time, height, width) with M-RoPE."""

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [B, N, R], at positions [B, N]; [3, B, N] for models whose positions have three axes."""
        with torch.no_grad():
            cos, sin = self.module(torch.zeros(1), positions)
        return rotation_per_token(self.module, cos, sin)

    def first(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [1, N, R], of the positions 0 to N - 1 of text."""
        positions = torch.arange(count)[None]
        return self.at(positions.expand(3, 1, -1) if self.axes == 3 else positions)

"""Encode level: how long a method takes to compress one layer, relative to the prefill of that layer; this ratio is
what it adds to the time to the first token.

The prefill is a decoder layer of a 7B-class model as its matrix products: projections, causal attention, gated MLP.
Without norms, rotations and residuals the layer is a little faster, and the share a little larger, than in a model.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import layer_data, random_methods
from .interleaved_timing import Contender, interleave
from .layer_data import Cell
from .shapes import Shape

LEVEL = "encode"
PREFILL = "prefill-of-a-layer"


class DecoderLayer(NamedTuple):
    """The weights of one layer, [outputs, inputs] each."""

    query: torch.Tensor
    keys_and_values: torch.Tensor
    output: torch.Tensor
    gate_and_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def draw(cls, shape: Shape, device: torch.device, dtype: torch.dtype) -> "DecoderLayer":
        attended = shape.query_heads * shape.head_dim
        sizes = (
            (attended, shape.hidden),
            (2 * shape.kv_heads * shape.head_dim, shape.hidden),
            (shape.hidden, attended),
            (2 * shape.intermediate, shape.hidden),
            (shape.hidden, shape.intermediate),
        )
        return cls(*(torch.randn(size, device=device).to(dtype) * size[1] ** -0.5 for size in sizes))

    def prefill(self, x_BNC: torch.Tensor, shape: Shape) -> torch.Tensor:
        """[B, N, C] to [B, N, C]."""
        by_head = partial(torch.Tensor.unflatten, dim=2, sizes=(-1, shape.head_dim))
        query = by_head(F.linear(x_BNC, self.query)).transpose(1, 2)
        keys, values = by_head(F.linear(x_BNC, self.keys_and_values)).transpose(1, 2).chunk(2, dim=1)
        attended = F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=shape.group > 1)
        x_BNC = x_BNC + F.linear(attended.transpose(1, 2).flatten(2), self.output)
        gate, up = F.linear(x_BNC, self.gate_and_up).chunk(2, dim=2)
        return x_BNC + F.linear(F.silu(gate) * up, self.down)


@torch.no_grad()
def measure(cell: Cell, names: Sequence[str], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of one shape; `ratio` is the time of the layer's prefill over that of the method's pass."""
    shape = cell.shape
    x_BNC = torch.randn(cell.batch, cell.visual + cell.text, shape.hidden, device=cell.device).to(cell.dtype)
    layer = DecoderLayer.draw(shape, cell.device, cell.dtype)
    prompt = layer_data.prefill(cell, layer_data.draw(cell), cell.batch)
    contenders = [Contender(PREFILL, [partial(layer.prefill, x_BNC, shape)], graph=False)]
    for name in names:
        method = random_methods.make(name, shape.geometry(1), cell.tile, cell.device, cell.dtype, cell.seed)
        contenders.append(Contender(name, [partial(method.compress, prompt)], graph=False))
    times = interleave(contenders, cell.device, rounds, seconds, burst=0)
    return [
        {
            "level": LEVEL,
            "geometry": shape.name,
            "batch": cell.batch,
            "visual_tokens": cell.visual,
            "text_tokens": cell.text,
            "method": name,
            "baseline": PREFILL,
            "ratio": time.over(times[PREFILL]),
            "share": 1 / time.over(times[PREFILL]),
            "seconds": time.median,
            "iqr_seconds": time.iqr,
            "rounds": len(time.rounds),
            "failed": None,
        }
        for name, time in times.items()
    ]

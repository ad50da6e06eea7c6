"""Where and in which precision a run of `kvcapsule bench` measures."""

import torch

from kvcapsule.vlm.loading import DTYPES

from .bench_config import BenchConfig
from .layer_data import Cell
from .shapes import Shape


def device_of(config: BenchConfig) -> torch.device:
    """The device that a run measures."""
    return torch.device(config.device)


def precision_of(config: BenchConfig) -> torch.dtype:
    """The precision that a run measures in; by default float32 on a CPU and bfloat16 elsewhere."""
    if config.dtype != "auto":
        return DTYPES[config.dtype]
    return torch.float32 if device_of(config).type == "cpu" else torch.bfloat16


def cell_of(config: BenchConfig, shape: Shape, visual: int, batch: int) -> Cell:
    """A layer of this shape with `batch` sequences of `visual` visual tokens."""
    return Cell(shape, batch, visual, config.text, config.tile, precision_of(config), device_of(config), config.seed)

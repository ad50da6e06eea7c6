"""Capsules that destroy what they store, and sizes of the tiny VLM, for the tests of evaluation."""

from collections.abc import Callable

import pytest
import torch

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.config import CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig

LAYERS, TOKENS = 4, 196
TOKEN_BYTES = 2 * 2 * 32 * 4
"""Of one token in one layer: keys and values, 2 KV heads of 32, float32."""


@pytest.fixture(scope="session")
def make_capsule(geometry) -> Callable[..., Capsule]:
    """make_capsule(0.2): a capsule of this ratio whose maps are noise, so that it destroys what it stores."""

    def build(ratio: float, family: str = "kvcapsule", tile: int = TOKENS) -> Capsule:
        codec = (
            IdentityConfig(tile)
            if family == "identity"
            else KVCapsuleConfig(tile, True, (ratio,) * LAYERS, (ratio,) * LAYERS)
        )
        capsule = Capsule(CapsuleConfig(family, codec, geometry, "tiny")).eval().requires_grad_(False)
        generator = torch.Generator().manual_seed(0)
        for tensor in capsule.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=generator))
        return capsule

    return build

"""Small capsules of fixed numbers and what is saved beside them, for the tests of a capsule's files."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvcapsule import Capsule, CapsuleConfig, KVGeometry, atomic_files
from kvcapsule.codec import CodecConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.codec.kvcapsule import KVCapsuleConfig
from kvcapsule.codec.transform import TransformConfig

FILES = {"config.json", "model.safetensors", "README.md", "recipe.yaml", "metrics.json"}
GEOMETRY = KVGeometry(model_type="llava", layers=2, query_heads=4, kv_heads=2, head_dim=4, rotary="1d")
RECIPE = {"model": "org/vlm", "ratio": 0.5, "tiles": [8], "nested": {"seed": 3, "note": None}}
ROW = {
    "method": "capsule",
    "settings": {"r": 0.5},
    "accuracy": {"transcribe": 0.9375, "count": 1.0},
    "agreement": 0.96875,
    "kl": 0.0125,
    "visual_kv_bytes": 123456,
    "kv_bytes": 234567,
    "parameter_bytes": 3456,
    "compression": 2.5,
    "prefill_ratio": 1.25,
    "tokens_per_s_ratio": 0.75,
    "n": 200,
}
METRICS = {
    "train": {"loss": 0.0625},
    "eval": {"rows": [ROW, {**ROW, "method": "full|cache", "accuracy": {"count": None}}]},
}


def configure(**changes: Any) -> CapsuleConfig:
    codec = KVCapsuleConfig(tile=8, key_ratios=(0.5,) * 2, value_ratios=(0.75,) * 2)
    config = CapsuleConfig(
        "kvcapsule", codec, GEOMETRY, base_model="org/vlm", base_revision="a1b2c3", metadata={"samples": 12}
    )
    return replace(config, **changes)


def fixed_capsule(salt: int = 0, **changes: Any) -> Capsule:
    """A capsule whose numbers are multiples of 1/64, the same on every machine."""
    capsule = Capsule(configure(**changes))
    for i, (name, tensor) in enumerate(sorted(capsule.state_dict().items())):
        if name.endswith("kept"):
            tensor.copy_(torch.tensor([0, 3, 5, 6]))
        elif name.endswith("widths"):
            tensor.copy_(torch.tensor([0, 1, 2, 3, 4, 8])[torch.arange(tensor.numel()) % 6].view_as(tensor))
        else:
            tensor.copy_(((torch.arange(tensor.numel()) * 37 + 11 * i + salt) % 64 - 32).reshape(tensor.shape) / 64)
    return capsule


def loadable(capsule: Capsule) -> Capsule:
    """The capsule, with the size of each step in its place: loading refuses those that are 0 or less."""
    for name, tensor in capsule.state_dict().items():
        if name.endswith("step"):
            tensor.abs_().clamp_min_(1 / 64)
    return capsule


def equal(one: Capsule, other: Capsule) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fixed_capsule().save_pretrained(tmp_path / "tiny", recipe=RECIPE, metrics=METRICS)
    return tmp_path / "tiny"


CODECS: dict[str, tuple[str, CodecConfig]] = {
    "kvcapsule": ("kvcapsule", configure().codec),
    "mlp": ("kvcapsule", replace(configure().codec, key_decoder="mlp")),
    "few bits": ("kvcapsule", replace(configure().codec, latent_bits=3)),
    "identity": ("identity", IdentityConfig(tile=8)),
    "transform": ("transform", TransformConfig(8, True, (8, 16), (3, 4), (16, 8), (4, 2), joint_heads=2, bits=1.5)),
}


def limit_of_file_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system itself stops the write, in the middle of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write = atomic_files.write

    def limited(path: Path, content: bytes) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            write(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(atomic_files, "write", limited)

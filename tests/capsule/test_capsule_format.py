"""The format of a capsule's files: the golden capsule of version 1, and what is documented."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from support.capsule_files import CODECS, FILES, ROW, configure, fixed_capsule

from kvcapsule import Capsule
from kvcapsule.capsule import hub
from kvcapsule.codec import FAMILIES

GOLDEN = Path(__file__).parents[1] / "golden" / "capsule-v1"
FORMAT = Path(__file__).resolve().parents[2] / "checkpoints" / "FORMAT.md"


def test_golden_capsule_of_version_1() -> None:
    """A folder that stays for ever: whoever changes the format adds another for the new version and goes on reading
    this one."""
    assert set(os.listdir(GOLDEN)) == FILES
    assert hub.read_config(GOLDEN) == configure()
    # Written before the keys were known: their absence means their defaults.
    written = (GOLDEN / "config.json").read_text()
    assert "latent_bits" not in written and "align" not in written
    codec = hub.read_config(GOLDEN).codec
    assert (codec.latent_bits, codec.align) == (0, 1)
    capsule = Capsule.from_pretrained(GOLDEN)
    shapes = {"keys.kept": (4,), "keys.theta": (2, 8, 4), "values.basis": (2, 6, 8), "values.mean": (2, 4)}
    expected = {f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in shapes.items()}
    state = capsule.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected
    assert {str(t.dtype) for name, t in state.items() if name.endswith("kept")} == {"torch.int64"}
    assert {str(t.dtype) for name, t in state.items() if not name.endswith("kept")} == {"torch.float32"}
    assert state["layers.0.keys.kept"].tolist() == [0, 3, 5, 6]
    assert (state["layers.0.keys.theta"][0, :2] * 64).tolist() == [[-21, 16, -11, 26], [-1, -28, 9, -18]]
    assert (state["layers.1.values.basis"][1, 5] * 64).tolist() == [26, -1, -28, 9, -18, 19, -8, 29]
    assert (state["layers.1.values.mean"] * 64).tolist() == [[-19, 18, -9, 28], [1, -26, 11, -16]]
    # What the numbers mean: keys are read as theta K[kept], values as U^T U (V - mean) + mean.
    tile = torch.arange(1 * 2 * 8 * 4).reshape(1, 2, 8, 4) / 4
    keys, values = capsule.layers[1].keys.encode(tile), capsule.layers[1].values.encode(tile)
    assert torch.equal(keys.keys, tile[:, :, [0, 3, 5, 6]])
    assert (keys.score_map @ keys.keys)[0, 1, 7].tolist() == [-4.171875, -4.2578125, -4.34375, -4.4296875]
    restored = values.value_map @ values.values + values.value_mean[:, None]
    assert restored[0, 0, 0].tolist() == [2.97833251953125, 3.2911376953125, 3.41253662109375, 3.725341796875]


def test_the_format_is_that_of_the_golden_capsule(saved: Path) -> None:
    """If this fails, files written from now on differ from those of version 1: raise FORMAT_VERSION and add a golden
    capsule.

    Only keys with a default that means what their absence meant may join (checkpoints/FORMAT.md).
    """
    golden = (GOLDEN / "config.json").read_text()
    before = '    "canonical_frame": true,\n'
    joined = golden.replace(before, before + '    "latent_bits": 0,\n    "align": 1,\n')
    assert joined != golden
    assert (saved / "config.json").read_text() == joined
    with safe_open(saved / "model.safetensors", "pt") as new, safe_open(GOLDEN / "model.safetensors", "pt") as old:
        assert new.metadata() == old.metadata() == {"format": "kvcapsule", "format_version": "1"}
        assert set(new.keys()) == set(old.keys())
        for key in old.keys():  # noqa: SIM118
            one, other = new.get_tensor(key), old.get_tensor(key)
            assert one.dtype == other.dtype and torch.equal(one, other), key
    for name in ("recipe.yaml", "metrics.json"):
        assert (saved / name).read_bytes() == (GOLDEN / name).read_bytes()


def keys_of(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from keys_of(value)


def test_the_format_is_documented() -> None:
    text = FORMAT.read_text()
    capsules = [fixed_capsule(family=family, codec=codec) for family, codec in CODECS.values()]
    names = {name.split(".", 2)[2] for capsule in capsules for name in capsule.state_dict()}
    keys = {key for capsule in capsules for key in keys_of({**capsule.config.to_dict(), "metadata": {}})}
    missing = [word for word in {*FILES, *FAMILIES, *names, *keys, *ROW} if f"`{word}`" not in text]
    assert not missing, f"checkpoints/FORMAT.md does not explain {', '.join(sorted(missing))}."

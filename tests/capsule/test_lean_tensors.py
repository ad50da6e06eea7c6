"""Capsule files of format version 2: 16 bits, and no encoder's map that the decoder's gives."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.capsule_files import CODECS, FILES, configure, equal, fixed_capsule, loadable

from kvcapsule import Capsule
from kvcapsule.capsule import hub
from kvcapsule.capsule.lean_tensors import lean, restored
from kvcapsule.errors import CapsuleError

GOLDEN = Path(__file__).parents[1] / "golden" / "capsule-v2"
ENCODERS = ("tokens_in", "channels_in")


def solved() -> Capsule:
    """A transform code whose encoders along the tokens are the decoders' transposes, as a closed form's are, and of one
    layer's values along the channels too."""
    family, codec = CODECS["transform"]
    capsule = loadable(fixed_capsule(family=family, codec=codec, format_version=2))
    tensors = capsule.state_dict()
    for name, tensor in tensors.items():
        if name.endswith("tokens_in"):
            tensor.copy_(tensors[name.replace("_in", "_out")].transpose(-1, -2))
    of = "layers.1.values.transform.channels_"
    tensors[f"{of}in"].copy_(tensors[f"{of}out"])
    return capsule


def test_the_golden_capsule_of_version_2() -> None:
    """A folder that stays for ever, beside that of version 1."""
    assert set(os.listdir(GOLDEN)) == FILES
    assert hub.read_config(GOLDEN) == solved().config
    assert equal(Capsule.from_pretrained(GOLDEN), solved())


def test_the_files_written_are_those_of_the_golden_capsule(tmp_path: Path) -> None:
    """If this fails, files written from now on differ from those of version 2: take a new number, and add a golden
    capsule."""
    solved().save_pretrained(tmp_path / "capsule-v2")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "capsule-v2" / name).read_bytes() == (GOLDEN / name).read_bytes()


def test_what_the_decoder_gives_is_not_in_the_file() -> None:
    with safe_open(GOLDEN / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "kvcapsule", "format_version": "2"}
        encoders = [name for name in file.keys() if name.endswith(ENCODERS)]  # noqa: SIM118
        dtypes = {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    expected = [f"layers.{i}.{part}.transform.channels_in" for i in (0, 1) for part in ("keys", "values")][:-1]
    assert sorted(encoders) == sorted(expected)
    assert dtypes == {torch.float16, torch.uint8}
    assert sum(t.numel() for t in solved().state_dict().values()) > 1.5 * sum(
        t.numel() for t in load_file(GOLDEN / "model.safetensors").values()
    )


def test_a_capsule_keeps_its_version_and_its_bytes_when_saved_again(tmp_path: Path) -> None:
    loaded = Capsule.from_pretrained(GOLDEN)
    assert {t.dtype for t in loaded.state_dict().values()} == {torch.float32, torch.uint8}
    loaded.save_pretrained(tmp_path / "capsule-v2")
    assert (tmp_path / "capsule-v2" / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    loaded.bfloat16().save_pretrained(tmp_path / "other")
    assert equal(Capsule.from_pretrained(tmp_path / "other"), loaded)


def test_numbers_that_16_bits_cannot_hold_stay_as_they_are() -> None:
    tensors = {
        "fine": torch.tensor([1.0, -3.5, 1e-9]),
        "large": torch.tensor([1.0, 1e5]),
        "small": torch.tensor([3e-8, 1e-7]),
        "a.step": torch.tensor([1.0, 1e-9]),
        "double": torch.tensor([1.0], dtype=torch.float64),
        "none": torch.zeros(0),
    }
    found = lean(tensors)
    assert {name: t.dtype for name, t in found.items()} == {
        "fine": torch.float16,
        "large": torch.float32,
        "small": torch.float32,
        "a.step": torch.float32,
        "double": torch.float64,
        "none": torch.float32,
    }
    back = restored(dict(found))
    assert back["large"].tolist() == [1.0, 1e5] and back["fine"].tolist()[:2] == [1.0, -3.5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("layers.0.keys.transform.tokens_out", "layers.0.keys.transform.tokens_in is missing"),
        ("layers.0.keys.transform.step", "step is missing"),
    ],
)
def test_nothing_else_may_be_missing(tmp_path: Path, name: str, message: str) -> None:
    solved().save_pretrained(tmp_path / "capsule")
    path = tmp_path / "capsule" / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, {"format": "kvcapsule", "format_version": "2"})
    with pytest.raises(CapsuleError, match=message):
        Capsule.from_pretrained(tmp_path / "capsule")


def test_a_file_of_version_1_holds_all_maps(tmp_path: Path) -> None:
    family, codec = CODECS["transform"]
    capsule = loadable(fixed_capsule(family=family, codec=codec))
    assert capsule.config.format_version == configure().format_version == 1
    capsule.save_pretrained(tmp_path / "capsule")
    path = tmp_path / "capsule" / "model.safetensors"
    tensors = load_file(path)
    assert tensors.keys() == capsule.state_dict().keys()
    del tensors["layers.0.keys.transform.tokens_in"]
    save_file(tensors, path, {"format": "kvcapsule", "format_version": "1"})
    with pytest.raises(CapsuleError, match="tokens_in is missing"):
        Capsule.from_pretrained(tmp_path / "capsule")

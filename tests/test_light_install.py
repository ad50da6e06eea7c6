"""What an installation without extras, and the core without transformers, can do."""

import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.hidden_modules import run_without

from kvcapsule.cli import COMMANDS, EXTRA_OF, EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = {"sklearn": "scikit-learn"}
"""Modules that are not called as their package is."""
WITHOUT_EXTRAS = {module for modules in EXTRAS.values() for module in modules} | {
    "bitsandbytes",
    "gguf",
    "numba",
    "pandas",
    "peft",
    "pytorch_lightning",
    "scipy",
    "triton",
}
"""All that the extras bring, and what only these bring in their turn."""
WITHOUT_TRANSFORMERS = WITHOUT_EXTRAS | {"transformers", "tokenizers", "accelerate"}

CORE = """
import importlib
import pkgutil
import sys

import torch

import kvcapsule

for folder in ("segments", "codec", "methods", "policy", "capsule", "store"):
    package = importlib.import_module(f"kvcapsule.{folder}")
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
from kvcapsule import Capsule
from kvcapsule.kernels import attend
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.vlm.spans import VisualSpan

capsule = Capsule.from_pretrained("pages-vlm-kvcapsule")
geometry, tile = capsule.config.geometry, capsule.config.codec.tile
torch.manual_seed(0)
heads = (geometry.query_heads, geometry.kv_heads, geometry.kv_heads)
query, keys, values = (torch.randn(1, h, tile + 2, geometry.head_dim) for h in heads)
angle = torch.arange(tile + 2)[:, None] / 100.0 ** torch.linspace(0, 1, geometry.head_dim // 2).repeat(2)
spans, valid = [VisualSpan(0, 1, tile, (1, 1, tile))], torch.ones(1, tile + 2, dtype=torch.bool)
rotation = (angle.cos()[None], angle.sin()[None])
prefill = LayerPrefill(
    layer=0, query=query, keys=keys, values=values, spans=spans, valid=valid, scale=0.2, position_embeddings=rotation
)
visual, text = capsule.compress(prefill)
(stored,) = visual
assert stored.keys.shape[2] < tile
out = attend(query[:, :, -1:], [*visual, *text], 0.2, None)
assert out.shape == (1, geometry.query_heads, 1, geometry.head_dim) and out.isfinite().all()
assert "transformers" not in sys.modules
print("encoded and read")
"""

COMMAND = """
from kvcapsule.cli import main

sys.exit(main({arguments!r}))
"""


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return run_without(WITHOUT_EXTRAS, COMMAND.format(arguments=list(arguments)))


def test_the_core_needs_no_transformers() -> None:
    done = run_without(WITHOUT_TRANSFORMERS, CORE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "encoded and read\n"


def test_hidden_modules_are_not_found() -> None:
    done = run_without({"transformers"}, "import transformers")
    assert done.returncode == 1 and "No module named 'transformers'" in done.stderr


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_without_extras(name: str) -> None:
    done = command(*filter(None, [name]), "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: kvcapsule" in done.stdout


WORDS = {"report": ("pages-vlm-kvcapsule",)}
"""Of commands that need some."""


@pytest.mark.parametrize("name", EXTRA_OF)
def test_a_command_names_the_extra_that_is_missing(name: str) -> None:
    done = command(name, *WORDS.get(name, ()))
    assert done.returncode == 2 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"kvcapsule {name}: ") and line.endswith(
        f" is not installed: run `pip install 'kvcapsule[{EXTRA_OF[name]}]'`."
    )


@pytest.mark.parametrize(
    "arguments", [("methods",), ("models",), ("estimate", "--model", "pages-vlm", "--visual-tokens", "196")]
)
def test_commands_run_without_extras(arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_generate_runs_without_extras(tmp_path: Path) -> None:
    from kvcapsule.testbeds.pages import page

    page("test", 0).image.save(tmp_path / "page.png")
    words = "--model pages-vlm --capsule pages-vlm-kvcapsule --max-new-tokens 2 --image".split()
    done = command("generate", *words, str(tmp_path / "page.png"), "--prompt", "Read line 2.")
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stderr


@pytest.mark.parametrize("extra", EXTRAS)
def test_extras_bring_the_modules_that_commands_ask_for(extra: str) -> None:
    packages = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert packages == {canonicalize_name(OPTIONAL.get(module, module)) for module in EXTRAS[extra]}
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert not packages & base

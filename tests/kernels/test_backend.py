"""Which implementation serves which device, and that a model writes the same with each."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BatchFeature, LlavaForConditionalGeneration

from kvcapsule import kernels
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.inference.attach import attach
from kvcapsule.kernels import backend as choice
from kvcapsule.kernels import reference
from kvcapsule.kernels.cpu import library
from kvcapsule.kernels.triton import arguments
from kvcapsule.policy import EvenlySpaced
from kvcapsule.segments.segment import Segment


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice._chosen.clear()
    yield
    choice._chosen.clear()


def test_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choice.backend_for("cpu") == "cpu"
    assert choice.backend_for("mps") == "reference"
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    assert choice.backend_for("cuda") == "triton"


def test_without_what_kernels_need(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: None)
    monkeypatch.setattr(library, "compiler", lambda: None)
    for device, extra in (("cuda", "triton"), ("cpu", "cpu")):
        caplog.clear()
        assert choice.backend_for(device) == choice.backend_for(device) == "reference"
        (line,) = (record.getMessage() for record in caplog.records)
        assert "several times slower" in line and f"pip install 'kvcapsule[{extra}]'" in line
    for name, extra in (("triton", "triton"), ("cpu", "cpu")):
        choice._chosen.clear()
        monkeypatch.setenv(choice.VARIABLE, name)
        with pytest.raises(RuntimeError, match=rf"pip install 'kvcapsule\[{extra}\]'"):
            choice.backend_for("cpu")


def test_triton_says_at_first_use_that_it_compiles(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    choice.backend_for("cuda")
    choice.backend_for("cuda")
    assert [record.getMessage() for record in caplog.records] == [
        f"kvcapsule: Triton compiles the GPU kernels once for this machine, into {tmp_path / 'cache'}"
    ]
    (tmp_path / "cache" / "kernel").mkdir(parents=True)
    choice._chosen.clear()
    caplog.clear()
    choice.backend_for("cuda")
    assert not caplog.records


def test_one_line_on_a_machine_without_a_compiler(tmp_path: Path) -> None:
    """As a person sees it: on stderr, once a process, however many calls."""
    code = (
        "from kvcapsule.kernels import backend\nbackend.find_spec = lambda name: None\n"
        "backend.library.find_spec = lambda name: None\nprint(backend.backend_for('cpu'), backend.backend_for('cpu'))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CXX", choice.VARIABLE)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == ["reference", "reference"]
    (line,) = done.stderr.splitlines()
    assert line.endswith("install g++ or clang++, or pip install 'kvcapsule[cpu]'.")


def test_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "INTERPRETED", True)
    monkeypatch.setenv(choice.VARIABLE, "triton")
    assert choice.backend_for("cpu") == "triton"
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        choice.backend_for("cuda")
    monkeypatch.setattr(arguments, "INTERPRETED", False)
    choice._chosen.clear()
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 too"):
        choice.backend_for("cpu")
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    assert choice.backend_for("cpu") == "cpu"
    with pytest.raises(RuntimeError, match="KVCAPSULE_KERNELS=cpu serves the CPU alone, not tensors on cuda"):
        choice.backend_for("cuda")
    monkeypatch.setenv(choice.VARIABLE, "reference")
    choice._chosen.clear()
    assert choice.backend_for("cuda") == choice.backend_for("cpu") == "reference"


def test_a_wrong_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="KVCAPSULE_KERNELS=cuda: choose one of reference, cpu, triton"):
        choice.backend_for("cpu")


def test_numba_is_refused_and_cpu_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's kernels were compiled by Numba before."""
    monkeypatch.setenv(choice.VARIABLE, "numba")
    with pytest.raises(ValueError, match="set KVCAPSULE_KERNELS=cpu"):
        choice.backend_for("cpu")


def test_the_first_call_of_a_process_may_be_compiled(random_segment: Callable[..., Segment]) -> None:
    """The choice is made while the step is traced, and is no part of it."""
    segment, query = random_segment("raw", [0], dtype=torch.float32), torch.randn(1, 4, 1, 8)
    step = torch.compile(lambda q: kernels.attend(q, [segment], 0.2), fullgraph=True, backend="eager")
    assert not choice._chosen
    torch.testing.assert_close(step(query), reference.attend(query, [segment], 0.2))


@pytest.mark.parametrize("method", ["transform", "spaced"])
def test_a_model_writes_what_it_writes_with_the_reference(
    method: str,
    model: LlavaForConditionalGeneration,
    random_transform: Callable[..., Capsule],
    make_batch: Callable[..., BatchFeature],
    greedy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Left-padded rows, one with an image and one without."""
    # The kernels that Triton interprets are for tests alone: on a GPU the compiled ones.
    place = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(place)
    batch = make_batch((1, "Read."), (0, "What is there?")).to(place)
    compress = random_transform(98, (16, 12), (24, 20)) if method == "transform" else EvenlySpaced(0.1)
    options = greedy | {"max_new_tokens": 3, "min_new_tokens": 3}
    called = []
    for name in [name for name in choice.BACKENDS if place == "cpu" or name != "cpu"]:
        monkeypatch.setenv(choice.VARIABLE, name)
        choice._chosen.clear()
        with attach(model, compress):
            called.append(model.generate(**batch, **options))
    plain, *others = called
    for by_kernels in others:
        assert torch.equal(plain.sequences, by_kernels.sequences)
        torch.testing.assert_close(torch.stack(by_kernels.logits), torch.stack(plain.logits), rtol=0, atol=2e-4)
        assert not torch.equal(torch.stack(by_kernels.logits), torch.stack(plain.logits)), "the kernels were not asked"

"""Runs that are interrupted: what is kept, and that going on gives what an uninterrupted run would have given."""

import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kvcapsule.training.capsule_fit import CapsuleFit
from kvcapsule.training.checkpoints import Checkpoints
from kvcapsule.training.datamodule import Shares
from kvcapsule.training.families.transform import TransformFit
from kvcapsule.training.main import main

# Four steps an epoch.
QUICK = ["--data.size", "24", "--held-out", "8", "--batch", "4", "--moment-batches", "4", "--device", "cpu"]
QUICK += ["--codec.tile", "28"]
CODES = ["--transform.logit-batches", "0", "--transform.query-bank", "0", "--transform.kl-weight", "0"]
DESCENT = ["transform", *QUICK, *CODES, "--transform.steps", "7", "--transform.lr", "1e-3"]


Tensors = dict[str, torch.Tensor]


def weights(output: Path) -> Tensors:
    return load_file(output / "model.safetensors")


def require_same(one: Tensors, other: Tensors) -> None:
    """But for the last bits, in which sums differ on some CPUs by where in memory their terms lie; a step moves weights
    by a hundred times as much."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def uninterrupted(vlm: str, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """The weights of the descent in one go."""
    output = tmp_path_factory.mktemp("whole") / "c"
    assert main([*DESCENT, "--model", vlm, "--output", str(output)]) == 0
    return weights(output)


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int, do: Callable[[], None]) -> None:
    """Do something in the middle of a step."""
    step = TransformFit.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == number:
            do()
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TransformFit, "training_step", training_step)


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C raises, also where the tests run in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "workers"), [(2, "0"), (3, "0"), (5, "2")])
def test_a_descent_goes_on_with_the_rows_that_were_left(
    vlm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    uninterrupted: Tensors,
    number: int,
    workers: str,
) -> None:
    """In the midst of an epoch, at its end and in the second one."""
    output = tmp_path / "c"
    words = [*DESCENT, "--model", vlm, "--output", str(output), "--workers", workers]
    with monkeypatch.context() as patch:
        interrupt_step(patch, number, press)
        assert main(words) == 130
    shown = capsys.readouterr().err
    assert f"Kept in {output}.run: the last checkpoint." in shown and shown.rstrip().endswith(f"{words[-1]} --resume")
    assert not output.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with monkeypatch.context() as patch:
        patch.setattr(TransformFit, "prepare", lambda self: pytest.fail("solved again"))
        assert main([*words, "--resume"]) == 0
    assert "steps: 7 of 7" in capsys.readouterr().err
    require_same(weights(output), uninterrupted)


def test_a_run_that_dies_goes_on_at_its_last_checkpoint(
    vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Tensors
) -> None:
    monkeypatch.setattr("kvcapsule.training.checkpoints._EVERY_STEPS", 3)
    output = tmp_path / "c"
    words = [*DESCENT, "--model", vlm, "--output", str(output)]

    def die() -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        interrupt_step(patch, 5, die)
        with pytest.raises(MemoryError):
            main(words)
    assert json.loads(Path(f"{output}.run/run.json").read_text())["state"] == "interrupted"
    assert main([*words, "--resume"]) == 0
    require_same(weights(output), uninterrupted)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("cross-layer", CODES),
        ("transform", CODES),
        ("compact", ["--compact.bank", "16"]),
        ("coded-compact", ["--coded.bank", "16", "--coded.search_batches", "1"]),
        ("kvcapsule", ["--optim.soft_steps", "1", "--optim.hard_steps", "1"]),
    ],
)
def test_a_closed_form_is_solved_once(
    vlm: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    family: str,
    options: list[str],
) -> None:
    """Interrupted as it is measured, a run of any family goes on there."""
    words = [family, "--model", vlm, *QUICK, *options]
    assert main([*words, "--output", str(tmp_path / "whole")]) == 0

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "c"
    with monkeypatch.context() as patch:
        patch.setattr(CapsuleFit, "validation_step", interrupted)
        patch.setattr(Checkpoints, "on_train_batch_end", lambda *_: None)
        assert main([*words, "--output", str(output)]) == 130
    assert f"Kept in {output}.run: the closed form." in capsys.readouterr().err
    passes: list[int] = []
    batches = CapsuleFit.batches
    with monkeypatch.context() as patch:
        patch.setattr(CapsuleFit, "batches", lambda self, n, title: passes.append(n) or batches(self, n, title))
        assert main([*words, "--output", str(output), "--resume"]) == 0
    # Only kvcapsule looks at a batch, for its sizes.
    assert passes == ([1] if family == "kvcapsule" else [])
    require_same(weights(output), weights(tmp_path / "whole"))


def test_an_interrupt_before_anything_is_trained_leaves_nothing(
    vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformFit, "prepare", interrupted)
    assert main([*DESCENT, "--model", vlm, "--output", str(tmp_path / "c")]) == 130
    assert "nothing is kept" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def halted(vlm: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a descent that was interrupted at its third step."""
    output = tmp_path_factory.mktemp("halted") / "c"
    words = [*DESCENT, "--model", vlm, "--output", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        interrupt_step(patch, 2, press)
        assert main(words) == 130
    return words


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "c.run holds the logs and checkpoints of a former run: continue that run with --resume, or replace"),
        (["--resume", "--transform.steps", "8"], "the run to resume had another --transform.steps:"),
        (
            ["--resume", "--transform.lr", "1", "--seed", "3"],
            "had another --seed, --transform.lr: give the same options",
        ),
        (["--resume", "--codec.tile", "14"], "had another --codec.tile:"),
    ],
)
def test_other_options_than_the_runs_own_are_refused(
    halted: list[str], capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main([*halted, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("name", ["last.ckpt", "closed-form.ckpt"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04damaged", None])
def test_a_damaged_checkpoint_is_one_line(
    halted: list[str], capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    path = Path(f"{halted[-1]}.run") / name
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2] if content is None else content)
    try:
        assert main([*halted, "--resume"]) == 2
    finally:
        path.write_bytes(good)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is damaged" in line and "--force" in line


def test_steps_of_a_resumed_run_are_those_that_were_left() -> None:
    """Every row as often as in a run in one go, on any number of ranks."""
    for fixed in (False, True):
        for world in (1, 2):
            runs = [Shares(16, 4, 1, rank, world, fixed) for rank in range(world)]
            for shares in runs:
                shares.run(0, 8)
            whole = [list(shares) for shares in runs]
            assert Counter(row for steps in whole for step in steps for row in step) == dict.fromkeys(range(16), 2)
            for first in range(9):
                for shares, steps in zip(runs, whole, strict=True):
                    shares.run(first, 8)
                    assert list(shares) == steps[first:] and len(shares) == 8

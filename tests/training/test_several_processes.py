"""Two and four processes train the capsule that one process trains, and say what they exchange."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import several_processes
from support.several_processes import CASES, Trained
from support.tiny_training import ROWS, questions

NEAR = 1e-5
"""Most that a tensor of the codecs is off, relative to its greatest number."""
STEP = 2.0**-10
"""A step of the file's 16 bits, likewise."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Prompts of several lengths, and images one or two a row, so that the shares of a step are uneven."""
    return questions(tmp_path_factory.mktemp("data"), ROWS, pairs=3)


@pytest.fixture(scope="module")
def alone(source: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, found = tmp_path_factory.mktemp("alone"), dict[str, Trained]()

    def of(case: str) -> tuple[Trained, Path]:
        if case not in found:
            found[case] = several_processes.train(case, source, folder / case / "capsule")
        return found[case], folder / case / "capsule"

    return of


def launch(processes: int, cases: list[str], source: str, folder: Path) -> dict[str, list[Trained]]:
    """What each process of torchrun saw."""
    script, launcher = several_processes.__file__, [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), script, str(folder), source, "; ".join(cases)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-8000:]
    found = {}
    for case in cases:
        found[case] = [Trained() for _ in range(processes)]
        for rank, result in enumerate(found[case]):
            vars(result).update(torch.load(folder / case / f"{rank}.pt"))
    return found


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, float]:
    """The greatest difference of each tensor, relative to its greatest number."""
    assert one.keys() == other.keys()
    return {
        name: float((other[name].double() - x.double()).abs().max() / x.double().abs().max().clamp_min(1e-30))
        for name, x in one.items()
    }


def test(source, alone, tmp_path):
    cases = list(CASES)
    n = int(os.environ.get("N", "2"))
    found = launch(n, cases, source, tmp_path)
    for case in cases:
        one, _ = alone(case)
        first = found[case][0]
        worst = sorted(apart(one.tensors, first.tensors).items(), key=lambda p: -p[1])[:3]
        ranks = max(max(apart(first.tensors, o.tensors).values()) for o in found[case][1:])
        print(case, worst, "ranks", ranks, first.sums, first.gradients)

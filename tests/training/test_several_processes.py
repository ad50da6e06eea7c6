"""Two and four processes train the capsule that one process trains, and say what they exchange."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import several_processes
from support.several_processes import CASES, Trained

from kvcapsule.cli.sizes import shown_bytes

NEAR = 1e-5
"""Most that a tensor of the codecs is off, relative to its greatest number."""
STEP = 2.0**-10
"""A step of the file's 16 bits, likewise."""

Alone = Callable[[str], tuple[Trained, Path]]
Launched = tuple[dict[str, list[Trained]], Path]
"""What each process saw of each case, and the folder of the capsules."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # A capsule does not record weights in double precision.
    pytest.mark.filterwarnings("ignore::kvcapsule.errors.ModelMismatchWarning"),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return several_processes.questions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(source: str, tmp_path_factory: pytest.TempPathFactory) -> Alone:
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


@pytest.fixture(scope="module")
def two(source: str, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("two")
    return launch(2, list(CASES), source, folder), folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case: str, alone: Alone, two: Launched) -> None:
    require_same(case, alone, two)


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(["transform, descent"], id="one family"),
        pytest.param([case for case in CASES if case != "transform, descent"], id="the others", marks=pytest.mark.slow),
    ],
)
def test_four_processes_train_what_one_does(cases: list[str], alone: Alone, source: str, tmp_path: Path) -> None:
    found = launch(4, cases, source, tmp_path)
    for case in cases:
        require_same(case, alone, (found, tmp_path))


def require_same(case: str, alone: Alone, launched: Launched) -> None:
    (one, file), (runs, folder) = alone(case), launched
    first, *others = runs[case]
    for other in others:
        assert max(apart(first.tensors, other.tensors).values()) == 0
    for name, off in apart(one.tensors, first.tensors).items():
        assert off <= NEAR, name
    # A number that lies between two of the file's may have been rounded to either.
    saved = [load_file(place / "model.safetensors") for place in (file, folder / case / "capsule")]
    for name, off in apart(*saved).items():
        assert off <= STEP, name

    # What a run says that it exchanged is what went out.
    assert one.line == "" and one.sums == one.gradients == 0
    steps = 4 if case.startswith("kvcapsule") else 3 if "3" in CASES[case] else 0
    assert first.sums > 0 and bool(first.gradients) == bool(steps)
    gradients = f", and {shown_bytes(first.gradients // steps)} of gradients in each of {steps} steps" if steps else ""
    assert first.line == (
        f"{len(runs[case])} processes, each of which gave the others {shown_bytes(first.sums)} of sums and"
        f" samples{gradients}."
    )
    share = 1 / len(runs[case]) if case.endswith("shared out") else 1.0
    assert first.share == pytest.approx(share, abs=0.02)

"""Work of the CPU's kernels in the threads of PyTorch's own team."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.random_segments import SCALE, Draw, quantised, query_of

from kvcapsule.kernels.cpu import threads as team
from kvcapsule.kernels.cpu.attend import attend


@pytest.fixture(params=[True, False])
def teamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With PyTorch's team and, as where there is none, with threads of Python's."""
    if not request.param:
        monkeypatch.setattr(team, "openmp", lambda: None)
    elif team.openmp() is None:
        pytest.skip("this build of PyTorch has no OpenMP team that can be entered")
    return bool(request.param)


@pytest.mark.parametrize("many", [1, 2, 7, 40])
def test_each_piece_is_done_once(many: int, teamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces there are, more than threads or than tiles too: the sums of all tokens are the same."""
    draw = Draw()
    segments = [draw.transform([0, 1], 40, (3, 5), (4, 7)), quantised(draw.raw([0, 1], 200), 4, 4), draw.raw([0, 1], 9)]
    expected = attend(query_of(batch=2), segments, SCALE)
    monkeypatch.setattr(team, "count", lambda work: many)

    def call(_: int) -> torch.Tensor:
        return attend(query_of(batch=2), segments, SCALE)

    with ThreadPoolExecutor(3) as pool:
        for found in [call(0), *pool.map(call, range(3))]:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


_ALONE = """
import torch
from kvcapsule.kernels.cpu import threads
from kvcapsule.kernels.cpu.attend import attend
from kvcapsule.segments.segment import Segment

def count():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

torch.set_num_threads(2)
keys, values = torch.randn(4, 2, 300, 16), torch.randn(4, 2, 300, 16)
segment = Segment(keys, values, torch.arange(4))
torch.ones(2**22).sum()
before = count()
threads.count = lambda work: 2
del threads.pool
attend(torch.randn(4, 2, 1, 16), [segment], 0.25)
print(before, count())
"""


def test_the_team_is_pytorchs() -> None:
    """Its workers are there already when it is entered, so no thread is added. In a process without other teams."""
    if team.openmp() is None:
        pytest.skip("this build of PyTorch has no OpenMP team that can be entered")
    done = subprocess.run([sys.executable, "-c", _ALONE], capture_output=True, text=True, check=True)
    before, after = done.stdout.split()
    assert after == before

"""Work of the compiled kernels in the threads of PyTorch's own team."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvcapsule.kernels.native import share, team


@pytest.fixture(params=[True, False])
def teamed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With PyTorch's team and, as where there is none, with threads of Python's."""
    if not request.param:
        monkeypatch.setattr(team, "_openmp", lambda: None)
    elif team._openmp() is None:
        pytest.skip("this build of PyTorch has no OpenMP team that can be entered")
    return bool(request.param)


@pytest.mark.parametrize("many", [1, 2, 7])
def test_each_piece_is_done_once(many: int, teamed: bool) -> None:
    done = [0] * many

    def work(i: int) -> None:
        done[i] += 1

    def call(_: int) -> None:
        share.run(work, range(many))

    for _ in range(3):
        call(0)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))
    assert done == [6] * many


def test_what_a_piece_raises_is_raised(teamed: bool) -> None:
    def work(i: int) -> None:
        if i == 1:
            raise MemoryError("of a piece")

    with pytest.raises(MemoryError, match="of a piece"):
        share.run(work, range(2))


def test_the_team_is_pytorchs(request: pytest.FixtureRequest) -> None:
    """Its workers are there already when it is entered, so no thread is added."""
    if team._openmp() is None:
        pytest.skip("this build of PyTorch has no OpenMP team that can be entered")
    was = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(was))
    torch.set_num_threads(2)
    torch.ones(2**22).sum()
    before, done = _threads(), [0, 0]

    def work(i: int) -> None:
        done[i] += 1

    assert team.together(work, 2), "in the team, not in threads of Python's"
    assert done == [1, 1] and _threads() == before


def _threads() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))

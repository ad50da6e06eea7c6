"""What a save that was killed leaves beside the capsule is gone after the next one, and nothing else is."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.capsule_files import METRICS, equal, fixed_capsule

from kvcapsule import Capsule, atomic_files
from kvcapsule.capsule.write import update_metrics
from kvcapsule.cli.results import write_whole
from kvcapsule.eval.report.picture import save_picture

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def killed(act: Callable[[], None], method: str, calls: int) -> None:
    """Run `act` in a process that is killed at the nth call of a function of `os`."""
    process = os.fork()
    if not process:
        left = calls
        real = getattr(os, method)

        def kill(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(os, method, kill)
        act()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def save(folder: Path) -> None:
    fixed_capsule(salt=1).save_pretrained(folder)


@pytest.mark.parametrize(("method", "calls"), [("fsync", 1), ("fsync", 4), ("rename", 1), ("rename", 2), ("rmdir", 1)])
def test_the_next_save_removes_what_a_killed_one_left(saved: Path, method: str, calls: int) -> None:
    killed(lambda: save(saved), method, calls)
    assert len(os.listdir(saved.parent)) >= 2 or not saved.exists()
    fixed_capsule(salt=2).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(Capsule.from_pretrained(saved), fixed_capsule(salt=2))


def test_new_measurements_and_results_leave_no_litter(saved: Path) -> None:
    killed(lambda: update_metrics(saved, METRICS), "fsync", 2)
    assert len(os.listdir(saved.parent)) == 3
    update_metrics(saved, METRICS)
    killed(lambda: write_whole(saved.parent / "out.json", b"{}"), "fsync", 1)
    assert len(os.listdir(saved.parent)) == 2
    write_whole(saved.parent / "out.json", b"{}")
    assert sorted(os.listdir(saved.parent)) == ["out.json", "tiny"]
    killed(lambda: save_picture(Figure(), saved.parent / "out.png"), "fsync", 1)
    assert len(os.listdir(saved.parent)) == 3
    save_picture(Figure(), saved.parent / "out.png")
    assert sorted(os.listdir(saved.parent)) == ["out.json", "out.png", "tiny"]


def test_what_lives_or_is_of_another_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that is going on, one of another machine, one to another place, and a stranger's folder."""
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    try:
        names = []
        for target, process, machine in (
            (saved, living.pid, "here"),
            (saved, ended.pid, "elsewhere"),
            (saved.with_name("tiny.2"), ended.pid, "here"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda process=process: process)
                patch.setattr("socket.gethostname", lambda machine=machine: machine)
                names.append(f"{atomic_files.unique_name(target)}.partial")
        for name in (*names, ".tiny.mine"):
            (saved.parent / name).mkdir()
        monkeypatch.setattr("socket.gethostname", lambda: "here")
        save(saved)
        assert sorted(os.listdir(saved.parent)) == sorted(["tiny", ".tiny.mine", *names])
        living.communicate(b"\n")
        save(saved)
        assert sorted(os.listdir(saved.parent)) == sorted(["tiny", ".tiny.mine", *names[1:]])
    finally:
        living.kill()


def test_names_of_long_targets_differ() -> None:
    first, second = (atomic_files.unique_name(Path("x" * 200 + end)) for end in "ab")
    assert first[:95] != second[:95] and len(first) < 150

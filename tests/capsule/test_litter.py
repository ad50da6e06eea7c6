"""What a save that was killed leaves beside the capsule is gone after the next one, and nothing else is."""

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.figure import Figure
from support.capsule_files import METRICS, equal, fixed_capsule

from kvcapsule import Capsule, atomic_files, folder_swap
from kvcapsule.capsule.write import update_metrics
from kvcapsule.cli.results import write_whole
from kvcapsule.errors import CapsuleError, InputError
from kvcapsule.eval.report.picture import save_picture
from kvcapsule.folder_swap import exchange
from kvcapsule.training.checkpoints import WholeFiles
from kvcapsule.training.output_folder import output_folder
from kvcapsule.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def killed(act: Callable[[], None], method: str, calls: int, module: ModuleType = os) -> None:
    """Run `act` in a process that is killed before the nth call of a function of a module."""
    process = os.fork()
    if not process:
        left = calls
        real = getattr(module, method)

        def kill(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        setattr(module, method, kill)
        act()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL


def save(folder: Path) -> None:
    fixed_capsule(salt=1).save_pretrained(folder)


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a folder takes the place of another: most file systems of Linux can exchange two, others cannot."""
    if request.param == "renamed twice":
        monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
    elif not probed():
        pytest.skip("this system exchanges no folders")
    return str(request.param)


def probed() -> bool:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "one").mkdir()
        (Path(name) / "other").mkdir()
        return exchange(Path(name) / "one", Path(name) / "other")


@pytest.mark.parametrize(
    ("method", "calls"), [("fsync", 1), ("fsync", 4), ("fsync", 7), ("rename", 1), ("rename", 2), ("rmdir", 1)]
)
def test_a_killed_save_leaves_a_whole_capsule_and_the_next_one_no_litter(
    saved: Path, way: str, method: str, calls: int
) -> None:
    if method == "rename" and way == "exchanged":
        killed(lambda: save(saved), "exchange", 1, atomic_files)
    else:
        killed(lambda: save(saved), method, calls)
    assert len(os.listdir(saved.parent)) >= 2 or not saved.exists()
    there = Capsule.from_pretrained(saved)
    assert saved.exists() and any(equal(there, fixed_capsule(salt=salt)) for salt in (0, 1))
    fixed_capsule(salt=2).save_pretrained(saved)
    assert os.listdir(saved.parent) == ["tiny"]
    assert equal(Capsule.from_pretrained(saved), fixed_capsule(salt=2))


def test_what_was_moved_aside_is_back_before_anything_looks(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames there is nothing in its place; whoever reads, measures, trains or saves finds it."""
    monkeypatch.setattr(atomic_files, "exchange", lambda one, other: False)
    recipe = Recipe(output=str(saved))

    def train() -> None:
        with pytest.raises(InputError, match="tiny exists"), output_folder(recipe):
            pytest.fail("went on")

    for use in (
        lambda: Capsule.from_pretrained(saved),
        lambda: Capsule.from_pretrained(os.path.relpath(saved)),
        lambda: update_metrics(saved, METRICS),
        train,
        lambda: killed(lambda: save(saved), "fsync", 1),
    ):
        killed(lambda: save(saved), "rename", 2)
        assert not saved.exists()
        use()
        assert equal(Capsule.from_pretrained(saved), fixed_capsule())
    killed(lambda: save(saved), "rename", 2)

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CapsuleError, match=r"was killed, and the capsule that it left in .* cannot be renamed"):
        Capsule.from_pretrained(saved)


def test_folders_are_exchanged_or_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "\u00e4 b"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    if probed():
        assert exchange(one, other) and os.listdir(one) == [other.name] and os.listdir(other) == [one.name]
        assert not exchange(one, tmp_path / "missing") and os.listdir(one) == [other.name]
    monkeypatch.setattr(folder_swap, "_renameat2", lambda: None)
    assert not exchange(one, other) and one.is_dir()


def test_a_process_of_the_same_number_is_another(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container that is started anew, every process has the number that it had before."""
    for name in (atomic_files.unique_name(saved), atomic_files.unique_name(saved)[:-20] + "f" * 20):
        (saved.parent / name).touch()
    mine = atomic_files.unique_name(saved)[:-12]
    save(saved)
    first, second = sorted(os.listdir(saved.parent))
    assert first.startswith(mine) and second == "tiny"


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


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    WholeFiles().save_checkpoint({"step": 1}, path)
    killed(lambda: WholeFiles().save_checkpoint({"step": 2}, path), "fsync", 1)
    assert torch.load(path, weights_only=True) == {"step": 1} and len(os.listdir(tmp_path)) == 2
    WholeFiles().save_checkpoint({"step": 3}, path)
    assert torch.load(path, weights_only=True) == {"step": 3} and os.listdir(tmp_path) == ["last.ckpt"]


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

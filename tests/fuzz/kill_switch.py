"""Processes that are killed with signal 9 at a step of their writing, or at a moment."""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvcapsule import atomic_files
from kvcapsule.kernels import backend

_PATH_OF = {"open": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 0, "os.truncate": 0}
"""Audit events of Python with which files change, and which argument is the path."""


@dataclass(frozen=True)
class Kill:
    """When a process is killed."""

    step: int | None
    """Before which of its steps; None: seconds count from its start."""
    seconds: float
    """Behind that step or the start; the process goes on meanwhile."""


def watch(folder: Path, step: Callable[[str], None]) -> None:
    """Call a function with the name of each step with which this process changes what is in a folder, before it.

    Steps are files that are opened to be written, synced, renamed or removed, and folders that are made, exchanged or
    removed. The working directory becomes the folder, for names that are relative to an open one.
    """
    os.chdir(folder)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if (place := _PATH_OF.get(event)) is None or not isinstance(
            path := arguments[place], str | bytes | os.PathLike
        ):
            return
        if event == "open" and not (
            isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        ):
            return
        if Path(os.path.abspath(os.fsdecode(path))).is_relative_to(folder):
            step(event.removeprefix("os."))

    sys.addaudithook(audit)
    # Python has no audit events for these.
    for module, name in ((os, "fsync"), (atomic_files, "exchange")):
        setattr(module, name, _preceded(partial(step, name), getattr(module, name)))


def _preceded(step: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    def preceded(*arguments: Any) -> Any:
        step()
        return call(*arguments)

    return preceded


def killed(act: Callable[[], None], kill: Kill, folder: Path) -> bool:
    """Run a function in a child process, and kill it; whether it was killed before it came to its end.

    Args:
        act: the function.
        kill: when.
        folder: whose changes are its steps.

    Raises:
        AssertionError: if the function fails by itself.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _run_in_child(lambda: _act_with_switch(act, kill, folder, writer), None)
    os.close(writer)
    try:
        if kill.step is None or os.read(reader, 1):
            time.sleep(kill.seconds)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    finally:
        os.close(reader)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"died of signal {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, "failed before it was killed: see the traceback above"
    return False


def _act_with_switch(act: Callable[[], None], kill: Kill, folder: Path, writer: int) -> None:
    left = kill.step

    def step(name: str) -> None:
        nonlocal left
        if left is None or left <= 0:
            return
        left -= 1
        if left:
            return
        if kill.seconds:
            os.write(writer, b".")
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, step)
    act()


def measured(act: Callable[[], None], folder: Path) -> tuple[list[str], float]:
    """The names of the steps, and the seconds, of a function that runs to its end in a child process."""

    def count() -> tuple[list[str], float]:
        steps: list[str] = []
        watch(folder, steps.append)
        began = time.perf_counter()
        act()
        return steps, time.perf_counter() - began

    counted: tuple[list[str], float] = in_child(count)
    return counted


def in_child(act: Callable[[], Any]) -> Any:
    """What a function returns that runs in a child process.

    Raises:
        AssertionError: with the traceback, if it raises.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        _run_in_child(act, writer)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        content = stream.read()
    status = os.waitpid(child, 0)[1]
    assert os.WIFEXITED(status), f"died of signal {os.WTERMSIG(status)}"
    came, value = pickle.loads(content)
    assert came, value
    return value


def _run_in_child(act: Callable[[], Any], writer: int | None) -> None:
    """Run, hand over what came of it, and end this process."""
    # Nothing here is about speed, and no kernel is compiled in a process that is killed. The parent's own choice stays.
    os.environ[backend.VARIABLE] = "reference"
    backend._chosen.clear()
    try:
        outcome, code = (True, act()), 0
    except BaseException as error:
        outcome, code = (False, "".join(traceback.format_exception(error))), 1
    if writer is not None:
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(outcome, stream)
    elif code:
        os.write(2, str(outcome[1]).encode())
    os._exit(code)

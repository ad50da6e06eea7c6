"""Places that fail a command: streams that are closed or full, arguments that are no text, disks, names and memory."""

import errno
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcapsule.cli import COMMANDS, endings, main
from kvcapsule.cli.errors import complain
from kvcapsule.cli.results import require_writable, write_json
from kvcapsule.errors import InputError, KernelError

LIGHT = """
import sys
from types import ModuleType
from kvcapsule.cli import COMMANDS, main

def run(argv):
    print("\\xe4" * int(argv[0]))
    print("a line of progress", file=sys.stderr)
    with open(argv[1], "w") as file:
        file.write("saved")
    return 0

module = ModuleType("light")
module.main = run
sys.modules["light"] = module
COMMANDS["light"] = "light:main"
sys.exit(main())
"""
"""A process with a command that needs no library."""


def light(
    tmp_path: Path, redirections: str, size: int = 1, word: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run that command in a shell, with redirections; what reaches its stderr otherwise is read."""
    command = f'"$PYTHON" -c "$LIGHT" light {size} "$FILE"{word} {redirections}'
    own = {"PYTHON": sys.executable, "LIGHT": LIGHT, "FILE": str(tmp_path / "file"), **variables}
    return subprocess.run(
        ["bash", "-c", command], env=os.environ | own, capture_output=True, text=True, timeout=60, check=False
    )


def line_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.returncode, done.stderr)
    return done.stderr.strip()


@pytest.mark.parametrize("redirections", ["2>&-", "<&-", "2>&- <&-", "2>/dev/null"])
def test_closed_streams_that_no_result_goes_to(tmp_path: Path, redirections: str) -> None:
    """What is opened next is not written over by what is printed."""
    done = light(tmp_path, redirections)
    assert done.returncode == 0 and done.stdout == "ä\n"
    assert (tmp_path / "file").read_text() == "saved"


@pytest.mark.parametrize("redirections", [">&-", ">&- <&-"])
def test_a_closed_stdout_is_refused_before_the_work(tmp_path: Path, redirections: str) -> None:
    assert line_of(light(tmp_path, redirections)) == (
        "kvcapsule light: standard output is closed: redirect it to a file, or to /dev/null."
    )
    assert not (tmp_path / "file").exists()


def test_all_streams_closed(tmp_path: Path) -> None:
    done = light(tmp_path, ">&- 2>&- <&-")
    assert done.returncode == 2 and not done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("size", [1, 100_000])
def test_a_full_stdout(tmp_path: Path, size: int) -> None:
    done = light(tmp_path, ">/dev/full", size)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("kvcapsule light: standard output")
    assert (
        "the disk is full" in done.stderr and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_stderr(tmp_path: Path) -> None:
    assert light(tmp_path, "2>/dev/full").returncode == 2
    assert light(tmp_path, "2>/dev/full", word="$'\\xff'").returncode == 2


@pytest.mark.parametrize(
    "variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONUTF8": "0", "LC_ALL": "C"}]
)
def test_a_stdout_without_the_characters(tmp_path: Path, variables: dict[str, str]) -> None:
    done = light(tmp_path, "", **variables)
    assert done.returncode == 0 and done.stdout in ("ä\n", "\\xe4\n"), done.stderr


def test_arguments_that_are_no_text(tmp_path: Path) -> None:
    assert "no text in UTF-8" in line_of(light(tmp_path, "", word="$'\\xff'"))
    # Python takes the locale's word for it: where that is not UTF-8, nothing beyond ASCII is text.
    done = light(tmp_path, "", word="ä", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", LC_ALL="C")
    assert "LC_ALL=C.UTF-8" in line_of(done)
    assert light(tmp_path, "", word="ä", LC_ALL="C").returncode == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("name", COMMANDS)
def test_help_that_cannot_be_written(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8", closefd=True) as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert main([name, "--help"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"kvcapsule {name}: ") and "the disk is full" in line


def raising(error: BaseException) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


class OutOfMemoryError(RuntimeError):
    """As PyTorch calls it."""


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x"), ["/x cannot be used: the disk is full", "space"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["cannot be written: the disk is full", endings.TRACEBACK]),
        (OSError(errno.EROFS, "Read-only file system", "/x"), ["/x cannot be used: Read-only", "permissions"]),
        (PermissionError(errno.EACCES, "Permission denied", b"/x", None, "/y"), ["/x or /y", "permissions"]),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 5000), ["nnn...nnn", "shorter name"]),
        (OSError(errno.EMFILE, "Too many open files", "/x"), ["ulimit"]),
        (OSError("of several\nlines"), ["of several lines"]),
        (
            UnicodeEncodeError("utf-8", "a\ud800", 1, 2, "surrogates not allowed"),
            ["'\\ud800' cannot be written in utf-8"],
        ),
        (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid start byte"), ["no text in UTF-8", "byte 1"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested too deep", endings.TRACEBACK]),
        (MemoryError(), ["memory is used up"]),
        (OutOfMemoryError("CUDA out of memory"), ["memory is used up"]),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ["memory is used up"]),
        (ValueError("embedded null byte"), ["null character"]),
        (KernelError("the compiler\nfails"), ["the compiler fails"]),
    ],
    ids=lambda value: f"{type(value).__name__}" if isinstance(value, BaseException) else "",
)
def test_what_a_place_may_refuse_is_one_line(
    error: Exception, parts: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert endings.run_to_end("kvcapsule other", raising(error)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("kvcapsule other: ") and len(line) < 400
    assert not [part for part in parts if part not in line], line
    if not isinstance(error, InputError | KernelError):
        monkeypatch.setenv(endings.TRACEBACK, "1")
        with pytest.raises(type(error)):
            endings.run_to_end("kvcapsule other", raising(error))


@pytest.mark.parametrize("error", [ValueError("odd"), RuntimeError("odd"), KeyError("odd"), AssertionError()])
def test_defects_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        endings.run_to_end("kvcapsule other", raising(error))


def test_a_complaint_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    complain("kvcapsule other", "\x1b[2Jred\x07 and \ud800 and ä")
    assert capsys.readouterr().err == "kvcapsule other: \\x1b[2Jred\\x07 and \\ud800 and ä\n"


def test_json_on_a_stdout_that_lacks_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    write_json("-", {"ä": 1})
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"ä": 1}  # type: ignore[attr-defined]


def test_a_folder_is_tried_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not stop a superuser, nor tell of a disk that is read-only."""

    def refuse(dir: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("kvcapsule.cli.results.TemporaryFile", refuse)
    with pytest.raises(InputError, match="cannot be written to: Read-only"):
        require_writable([str(tmp_path / "x.json")])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes")
def test_a_pipe_or_device_is_written_and_not_replaced(tmp_path: Path) -> None:
    """As /dev/null is, which a superuser could replace by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        require_writable([str(pipe)])
        write_json(str(pipe), {"a": 1})
        assert json.loads(os.read(reader, 100)) == {"a": 1}
    finally:
        os.close(reader)
    assert os.listdir(tmp_path) == ["pipe"] and pipe.is_fifo()

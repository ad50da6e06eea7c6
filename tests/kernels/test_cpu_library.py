"""Compiling the CPU's kernels: with a compiler that is missing, that fails, or whose library is there already."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcapsule.errors import KernelError
from kvcapsule.kernels import backend as choice
from kvcapsule.kernels.cpu import library

COMPILER = """#!/bin/sh
case "$*" in *--version*) echo "fake 1.0"; exit 0;; esac
echo called >> "$CALLS"
if [ -n "$FAILS" ]; then echo "no such machine" >&2; exit 1; fi
while [ "$1" != "-o" ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler c++, alone on the PATH but for the shell's tools; and where it notes its calls. The cache is empty."""
    tools, notes = tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    (tools / "c++").write_text(COMPILER)
    (tools / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("FAILS", raising=False)
    monkeypatch.setenv("CALLS", str(notes))
    monkeypatch.setenv(library.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    return notes


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_a_library_is_compiled_once_and_kept(calls: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = library.built()
    assert first.parent == tmp_path / "cache" and first.read_text() == "library\n"
    assert [record.getMessage() for record in caplog.records] == [
        f"kvcapsule: compiling the CPU kernels once for this machine, a few seconds ({tmp_path / 'bin' / 'c++'}),"
        f" into {first}"
    ]
    assert library.built() == first and count(calls) == 1
    assert list(first.parent.iterdir()) == [first], "nothing half made stays"


def test_a_second_process_uses_what_the_first_has_compiled(calls: Path, tmp_path: Path) -> None:
    script = "from kvcapsule.kernels.cpu import library; print(library.built())"
    paths = {subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout for _ in range(2)}
    assert len(paths) == 1 and count(calls) == 1


def test_without_a_home_the_folder_is_a_temporary_one(
    calls: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(library.CACHE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert library.built().is_file()
    assert "cannot be written (Could not determine home directory.)" in caplog.text


def test_another_compiler_or_version_has_its_own(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.built()
    changed = tmp_path / "bin" / "c++"
    changed.write_text(COMPILER.replace("1.0", "1.1"))
    second = library.built()
    other = tmp_path / "other"
    other.write_text(COMPILER)
    other.chmod(0o755)
    monkeypatch.setenv("CXX", f"{other} -Wall")
    assert len({first, second, library.built()}) == 3 and count(calls) == 3


def test_a_compiler_that_fails_is_an_error_with_what_it_says(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "1")
    with pytest.raises(RuntimeError, match=r"(?s)could not be compiled by .*c\+\+ .*no such machine.*CXX"):
        library.built()
    monkeypatch.delenv("FAILS")
    assert library.built().is_file()


@pytest.mark.parametrize("blocked", ["cache", "parent"])
def test_a_cache_that_cannot_be_written(
    blocked: str, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files stand where folders should be: permissions would not stop root."""
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv(library.CACHE, str(file if blocked == "cache" else file / "cache"))
    path = library.built()
    assert path.is_file() and not path.is_relative_to(tmp_path / "file")
    assert "cannot be written" in caplog.records[0].getMessage() and len(caplog.records) == 2


def test_a_read_only_cache_with_the_library_is_used(
    calls: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = library.built()
    caplog.clear()

    def refuse(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(library, "_require_room", refuse)
    assert library.built() == first and not caplog.records and count(calls) == 1


def test_a_full_cache(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder, and one line if that is full too."""
    real = library._require_room

    def refuse(folder: Path) -> None:
        if folder.is_relative_to(tmp_path / "cache") or full:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        real(folder)

    full = False
    monkeypatch.setattr(library, "_require_room", refuse)
    library._temporary_folder.cache_clear()
    assert library.built().is_file() and not list((tmp_path / "cache").iterdir())
    full = True
    library._temporary_folder.cache_clear()
    with pytest.raises(KernelError, match=rf"No space left.*{library.CACHE}.*KVCAPSULE_KERNELS"):
        library.built()


def test_a_damaged_library_is_compiled_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a power cut leaves it."""
    monkeypatch.setenv(library.CACHE, str(tmp_path))
    # It is not run, so it is compiled quickly.
    monkeypatch.setattr(library, "FLAGS", ["-O0" if flag == "-O3" else flag for flag in library.FLAGS])
    # The body alone: what tests loaded before is still the library.
    path = library.built()
    path.write_bytes(b"")
    assert library._load.__wrapped__().kvcapsule_workspace_size
    assert not path.exists() and "cannot be loaded" in caplog.text


def test_the_cache_folder(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(library.CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert library.built().parent == tmp_path / "xdg" / "kvcapsule"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.built().parent == tmp_path / "home" / ".cache" / "kvcapsule"


def test_without_a_compiler(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference, and one line that says what to install; an error where the kernels are asked for."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setattr(choice, "_chosen", {})
    assert library.compiler() is None
    with caplog.at_level(logging.WARNING):
        assert [choice.backend_for("cpu") for _ in range(3)] == ["reference"] * 3
    assert len(caplog.records) == 1 and "pip install 'kvcapsule[cpu]'" in caplog.records[0].getMessage()
    monkeypatch.setenv(choice.VARIABLE, "cpu")
    monkeypatch.setattr(choice, "_chosen", {})
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found: .*or unset the variable"):
        choice.backend_for("cpu")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found"):
        library.built()


def test_which_compiler(calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """$CXX, what is on the PATH, and last of all the one of the package ziglang."""
    assert library.compiler() == [str(tmp_path / "bin" / "c++")]
    monkeypatch.setattr(library, "find_spec", lambda name: name)
    assert library.compiler() == [str(tmp_path / "bin" / "c++")]
    os.remove(tmp_path / "bin" / "c++")
    assert library.compiler() == [sys.executable, "-m", "ziglang", "c++", "-nostdlib++"]
    monkeypatch.setenv("CXX", f"{sys.executable} -v")
    assert library.compiler() == [sys.executable, "-v"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="CXX=no-such-compiler"):
        library.compiler()

"""Compile the C++ of this folder at first use, keep the library in the user's cache folder, and load it."""

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

CACHE = "KVCAPSULE_CACHE"
"""The environment variable that names the cache folder. Default: `kvcapsule` in XDG_CACHE_HOME, or in ~/.cache."""
INSTALL = "install g++ or clang++, or pip install 'kvcapsule[cpu]'"
FLAGS = shlex.split(
    "-std=c++17 -O3 -march=native -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-math-errno -Wno-psabi"
)
_FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)
_lock = threading.Lock()


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, else what is on the PATH, else the clang of the PyPI package `ziglang`.

    Raises:
        RuntimeError: if CXX names what is not there.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise RuntimeError(f"CXX={shlex.join(named)}: there is no such compiler; {INSTALL}, or unset CXX.")
        return named
    if path := shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return [path]
    return [sys.executable, "-m", "ziglang", "c++", "-nostdlib++"] if find_spec("ziglang") else None


def library() -> ctypes.CDLL:
    """The kernels; compiled, if this machine has not done so before.

    Raises:
        RuntimeError: without a compiler, or where it fails; the message holds the compiler's own.
    """
    with _lock:
        return _load()


@cache
def _load() -> ctypes.CDLL:
    try:
        kernels = ctypes.CDLL(str(built()))
    except OSError as error:
        raise RuntimeError(
            f"the CPU kernels cannot be written or loaded ({error}): name another folder in {CACHE}, or set"
            " KVCAPSULE_KERNELS=reference."
        ) from error
    kernels.kvcapsule_workspace_size.restype = ctypes.c_int64
    kernels.kvcapsule_workspace_size.argtypes = kernels.kvcapsule_finish.argtypes = (ctypes.c_void_p,)
    kernels.kvcapsule_run_piece.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    return kernels


def built() -> Path:
    """The library's file, named by all that its code depends on: sources, compiler, options and CPU."""
    if (command := compiler()) is None:
        raise RuntimeError(f"no C++ compiler was found: {INSTALL}.")
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + repr((command, FLAGS, platform.machine(), _cpu())).encode())
    for source in sorted(path for path in _FOLDER.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    path = _cache_folder() / f"attend-{digest.hexdigest()[:24]}.so"
    if not path.is_file():
        _compile([*command, *FLAGS, str(_FOLDER / "attend.cpp")], path)
    return path


def _cache_folder() -> Path:
    """The folder for libraries; a temporary one, for this process alone, where the user's cannot be written."""
    try:
        folder = Path(os.environ.get(CACHE) or _default_folder())
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError) as error:
        what = "the CPU kernels are compiled for this process alone"
        _logger.warning("kvcapsule: the cache folder cannot be written (%s): %s.", error, what)
        folder = Path(tempfile.mkdtemp(prefix="kvcapsule-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _default_folder() -> Path:
    """Raises RuntimeError where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcapsule"


def _cpu() -> str:
    """What tells CPUs apart: their names and the instructions that they have."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))} or lines))


def _compile(command: list[str], path: Path) -> None:
    _logger.warning(
        "kvcapsule: compiling the CPU kernels once for this machine, a few seconds (%s), into %s", command[0], path
    )
    # Beside its place, then renamed: several processes may do the same at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run([*command, "-o", f"{folder}/new.so"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"the CPU kernels could not be compiled by {shlex.join(command)}:\n{done.stderr.strip()}\n"
                "Name another compiler in CXX, or set KVCAPSULE_KERNELS=reference."
            )
        os.replace(f"{folder}/new.so", path)

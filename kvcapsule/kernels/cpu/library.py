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
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from ...atomic_files import remove_litter, unique_name
from ...errors import KernelError

CACHE = "KVCAPSULE_CACHE"
"""The environment variable that names the cache folder. Default: `kvcapsule` in XDG_CACHE_HOME, or in ~/.cache."""
INSTALL = "install g++ or clang++, or pip install 'kvcapsule[cpu]'"
FLAGS = shlex.split(
    "-std=c++17 -O3 -march=native -shared -fPIC -fvisibility=hidden -fno-exceptions -fno-math-errno -Wno-psabi"
)
_ROOM = 2**20
"""Bytes that are free wherever the library is compiled to; it is below half as large."""
_FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)
_lock = threading.Lock()


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, else what is on the PATH, else the clang of the PyPI package `ziglang`.

    Raises:
        KernelError: if CXX names what is not there.
    """
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise KernelError(f"CXX={shlex.join(named)}: there is no such compiler; {INSTALL}, or unset CXX.")
        return named
    if path := shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        return [path]
    return [sys.executable, "-m", "ziglang", "c++", "-nostdlib++"] if find_spec("ziglang") else None


def library() -> ctypes.CDLL:
    """The kernels; compiled, if this machine has not done so before.

    Raises:
        KernelError: without a compiler, or where it fails; the message holds the compiler's own.
    """
    with _lock:
        return _load()


@cache
def _load() -> ctypes.CDLL:
    path = built()
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        # A library that a power cut left empty, or a disk that no code is run from.
        kernels = _loaded_elsewhere(path, error)
    kernels.kvcapsule_workspace_size.restype = ctypes.c_int64
    kernels.kvcapsule_workspace_size.argtypes = kernels.kvcapsule_finish.argtypes = (ctypes.c_void_p,)
    kernels.kvcapsule_run_piece.argtypes = (ctypes.c_void_p, ctypes.c_int64)
    return kernels


def _loaded_elsewhere(path: Path, error: OSError) -> ctypes.CDLL:
    """The kernels compiled anew into a temporary folder; error: why the library at `path` cannot be loaded.

    Raises:
        KernelError: if that cannot be loaded either.
    """
    command, name = _command(), path.name
    try:
        # One that another user wrote, or on a read-only disk, stays.
        with suppress(OSError):
            path.unlink()
        folder = _temporary_folder(f"{path} cannot be loaded ({error})")
        _compile(command, folder / name)
        return ctypes.CDLL(str(folder / name))
    except OSError as second:
        raise KernelError(
            f"the CPU kernels cannot be written or loaded ({second}): name another folder in {CACHE}, or in TMPDIR, or"
            " set KVCAPSULE_KERNELS=reference."
        ) from second


def built() -> Path:
    """The library's file, named by all that its code depends on: sources, compiler, options and CPU.

    Raises:
        KernelError: without a compiler, where it fails, and where no folder can be written.
    """
    command = _command()
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    digest = hashlib.sha256(version + repr((command, FLAGS, platform.machine(), _cpu())).encode())
    for source in sorted(path for path in _FOLDER.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(source.read_bytes())
    name = f"attend-{digest.hexdigest()[:24]}.so"
    try:
        folder = Path(os.environ.get(CACHE) or _default_folder())
        # One that may only be read serves as well.
        if (folder / name).is_file():
            return folder / name
        folder.mkdir(parents=True, exist_ok=True)
        _require_room(folder)
    except (OSError, RuntimeError) as error:
        folder = _temporary_folder(f"the cache folder cannot be written ({error})")
    _compile(command, folder / name)
    return folder / name


def _command() -> list[str]:
    """The compiler's command. Raises KernelError without one."""
    if (command := compiler()) is None:
        raise KernelError(f"no C++ compiler was found: {INSTALL}.")
    return command


def _require_room(folder: Path) -> None:
    """Raises OSError if no file as large as the library can be written to a folder."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(_ROOM))


@cache
def _temporary_folder(reason: str) -> Path:
    """A folder that goes when this process ends; reason: why the user's is not used.

    Raises:
        KernelError: if none can be made.
    """
    _logger.warning("kvcapsule: %s: the CPU kernels are compiled for this process alone.", reason)
    try:
        folder = Path(tempfile.mkdtemp(prefix="kvcapsule-"))
        _require_room(folder)
    except OSError as error:
        raise KernelError(
            f"the CPU kernels cannot be written to a temporary folder ({error}): name a folder in {CACHE}, or set"
            " KVCAPSULE_KERNELS=reference."
        ) from error
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
    """Compile the kernels with a compiler's command. Raises KernelError where it fails."""
    _logger.warning(
        "kvcapsule: compiling the CPU kernels once for this machine, a few seconds (%s), into %s", command[0], path
    )
    # Beside its place, then renamed: several processes may do the same at once.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{unique_name(path)}.") as folder:
        line = [*command, *FLAGS, str(_FOLDER / "attend.cpp"), "-o", f"{folder}/new.so"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise KernelError(
                f"the CPU kernels could not be compiled by {shlex.join(line)}:\n{done.stderr.strip()}\n"
                "Name another compiler in CXX, or set KVCAPSULE_KERNELS=reference."
            )
        os.replace(f"{folder}/new.so", path)
    remove_litter(path)

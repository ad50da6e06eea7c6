"""Compile the C++ of this folder at first use, keep the library in the user's cache folder, and load it."""

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
from importlib.util import find_spec
from pathlib import Path

CACHE = "KVCAPSULE_CACHE"
"""The environment variable that names the cache folder. Default: `kvcapsule` in XDG_CACHE_HOME, or in ~/.cache."""
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-Wno-psabi")
NATIVE = "-march=native"
_FOLDER = Path(__file__).parent
_logger = logging.getLogger(__name__)
_lock = threading.Lock()
_loaded: dict[str, ctypes.CDLL] = {}


def compiler() -> list[str] | None:
    """The command of a C++ compiler: $CXX, else what is on the PATH, else the clang of the PyPI package `ziglang`. None: there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named if shutil.which(named[0]) else None
    for name in COMPILERS:
        if path := shutil.which(name):
            return [path]
    return [sys.executable, "-m", "ziglang", "c++"] if find_spec("ziglang") else None


def library(target: str = NATIVE) -> ctypes.CDLL:
    """The kernels, compiled for a target that the compiler knows (an option `-march=...`).

    Raises:
        RuntimeError: without a compiler, or where it fails; the message holds the compiler's own.
    """
    with _lock:
        if target not in _loaded:
            loaded = ctypes.CDLL(str(_built(target)))
            loaded.kvcapsule_workspace.restype = ctypes.c_int64
            loaded.kvcapsule_run_piece.argtypes = (ctypes.c_void_p, ctypes.c_int64)
            for function in (loaded.kvcapsule_workspace, loaded.kvcapsule_finish):
                function.argtypes = (ctypes.c_void_p,)
            _loaded[target] = loaded
        return _loaded[target]


def _built(target: str) -> Path:
    command = compiler()
    if command is None:
        raise RuntimeError("no C++ compiler was found ($CXX, c++, g++, clang++): install one, or pip install 'kvcapsule[cpu]'.")
    folder = _cache_folder()
    path = folder / f"attend-{_key(command, target)}.so"
    if not path.is_file():
        _compile([*command, *FLAGS, target], path)
    return path


def _cache_folder() -> Path:
    """The folder for libraries; a temporary one, for this process alone, where the user's cannot be written."""
    base = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcapsule"
    folder = Path(base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        _logger.warning("kvcapsule: %s cannot be written (%s): the CPU kernels are compiled for this process alone.", folder, error.strerror)
        return Path(tempfile.mkdtemp(prefix="kvcapsule-"))
    return folder


def _key(command: list[str], target: str) -> str:
    """Of all that the machine code depends on: sources, compiler, options, and the CPU."""
    digest = hashlib.sha256()
    for source in sorted(path for path in _FOLDER.iterdir() if path.suffix in (".h", ".cpp")):
        digest.update(source.name.encode() + source.read_bytes())
    version = subprocess.run([*command, "--version"], capture_output=True, check=False).stdout
    digest.update(version + repr((command, FLAGS, target, platform.machine(), _cpu())).encode())
    return digest.hexdigest()[:24]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _compile(command: list[str], path: Path) -> None:
    _logger.warning("kvcapsule: compiling the CPU kernels once for this machine (%s) into %s", command[0], path)
    # Beside its place, then renamed: several processes may do the same at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        done = subprocess.run([*command, str(_FOLDER / "attend.cpp"), "-o", str(built), "-lm"], capture_output=True, text=True, check=False)
        if done.returncode or not built.is_file():
            raise RuntimeError(
                f"the CPU kernels could not be compiled by {shlex.join(command)}:\n{done.stderr.strip()}\n"
                "Name another compiler in CXX, or set KVCAPSULE_KERNELS=reference."
            )
        os.replace(built, path)

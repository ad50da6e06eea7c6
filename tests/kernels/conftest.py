"""The parts of the CPU's kernels that tests look at by themselves."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from kvcapsule.kernels.cpu import library


@pytest.fixture(scope="session")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """cpu_probe.cpp, compiled as the kernels are."""
    command, built = library.compiler(), tmp_path_factory.mktemp("probe") / "probe.so"
    assert command is not None
    flags = [flag for flag in library.FLAGS if flag != "-fvisibility=hidden"]
    source = Path(__file__).with_name("cpu_probe.cpp")
    folder = Path(library.__file__).parent
    subprocess.run([*command, *flags, f"-I{folder}", str(source), "-o", str(built)], check=True)
    return ctypes.CDLL(str(built))

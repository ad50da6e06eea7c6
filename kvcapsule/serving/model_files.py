"""The digest of a model's files, computed in the background when an engine starts."""

import hashlib
import logging
import os
from pathlib import Path
from threading import Thread

_log = logging.getLogger(__name__)
_CHUNK = 1 << 22
_WEIGHTS = (".safetensors", ".bin", ".pt")


class ModelFiles:
    """What identifies the weights that an engine has loaded: all files of the model's folder, by name and contents.

    Files must stay what they are from before the engine loads them until they are read here, once. Weights that an
    engine is given later, while it runs, are not noticed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._digest: str | None = None
        self._thread = Thread(target=self._read, daemon=True, name="kvcapsule model digest")
        self._thread.start()

    def digest(self) -> str | None:
        """SHA-256 in hex; None until all files are read, and for ever if one cannot be."""
        return self._digest

    def wait(self) -> str | None:
        """The digest once the files are read."""
        self._thread.join()
        return self._digest

    def _read(self) -> None:
        try:
            self._digest = files_digest(self.folder)
        except OSError as error:
            _log.warning("image store: not used, as the model's files cannot be read: %s.", error)


def files_digest(folder: Path) -> str:
    """SHA-256, in hex, of the names and contents of a folder's files; hidden ones do not count.

    Raises:
        OSError: if one cannot be read.
    """
    digest = hashlib.sha256()
    names = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    for name in names:
        if any(part.startswith(".") for part in name.parts):
            continue
        one = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                one.update(chunk)
        digest.update(f"{name.as_posix()!r} {one.hexdigest()}\n".encode())
    return digest.hexdigest()


def has_weights(folder: Path) -> bool:
    """Whether there are files in a folder that an engine could load weights from."""
    return any(any(folder.glob(f"*{suffix}")) for suffix in _WEIGHTS)


def model_folder(model: str, revision: str | None, downloads: str | None = None) -> Path | None:
    """The folder of a model's files on this machine; None if there is none.

    Args:
        model: a folder, or an id on the Hub.
        revision: of the latter.
        downloads: where the engine puts what it downloads; None: where the Hub's library does.
    """
    if Path(model).is_dir():
        return Path(model)
    # vLLM would take it from another hub.
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("true", "1"):
        return None
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, cache_dir=downloads, local_files_only=True))
    except (OSError, ValueError):
        return None

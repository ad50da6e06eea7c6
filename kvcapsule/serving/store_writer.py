"""What a worker gives to the image store, written in the background. Needs no vLLM."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import BoundedSemaphore

from ..errors import CapsuleError
from ..store.image_store import ImageStore
from .prompt_images import PromptImage

_WAITING = 64
"""Entries that may wait to be written; more are dropped, so that a slow disk holds nothing up."""


class StoreWriter:
    """Writes entries one after the other.

    Args:
        store: where.
        weights: digest of the model's weights; None while it is not known.
        model: its type, for listings.
    """

    def __init__(self, store: ImageStore, weights: Callable[[], str | None], model: str) -> None:
        self.store, self.weights, self.model = store, weights, model
        self._room = BoundedSemaphore(_WAITING)
        self._thread = ThreadPoolExecutor(1, "kvcapsule store")

    def put(self, image: PromptImage, data: bytes) -> bool:
        """Write an image's bytes soon; whether there was room for them to wait."""
        if not self._room.acquire(blocking=False):
            self.store.log_once("slow", "images are dropped, as the folder is written too slowly")
            self.store.count("refused")
            return False
        about = {"model": self.model, "tokens": image.length, "text": image.text}

        def write() -> None:
            try:
                self.store.put(image.key, data, about)
            finally:
                self._room.release()

        self._thread.submit(write)
        return True

    def refuse(self, error: CapsuleError) -> None:
        """Say, once, why images are not stored."""
        self.store.log_once("unstorable", f"an image is not stored: {str(error).rstrip('.')}")

    def flush(self) -> None:
        """Wait until everything is written."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Write what waits, and stop."""
        self._thread.shutdown()

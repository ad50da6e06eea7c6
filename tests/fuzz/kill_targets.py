"""What is killed in the midst, and what must hold then: here saves of capsules and writes to image stores."""

import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.capsule_files import METRICS, RECIPE, fixed_capsule

from kvcapsule import Capsule, ImageStore, atomic_files
from kvcapsule.store.entry import StoreKey
from kvcapsule.store.folder import PARTIAL


class Target:
    """Something that writes, its state before, and what must hold after it was killed and after the next run."""

    variants: Sequence[str] = ("",)

    def __init__(self, room: Path) -> None:
        """room: a folder for what all kills share."""
        self.room = room

    def prepare(self) -> None:
        """Make what all kills share."""

    def reset(self, place: Path, variant: str) -> None:
        """Make the state before in an empty folder."""

    def act(self, place: Path, variant: str) -> None:
        """What is killed; runs in a process of its own, as the next two."""
        raise NotImplementedError

    def check(self, place: Path, variant: str) -> None:
        """Raises AssertionError if something is half written."""
        raise NotImplementedError

    def again(self, place: Path, variant: str) -> str:
        """The next run, in one word. Raises AssertionError if it does not come to its end or leaves litter."""
        raise NotImplementedError


class Saves(Target):
    """Capsule.save_pretrained over a capsule and to a new place, with and without an exchange of folders."""

    variants = ("over one", "over one, renamed twice", "new")

    def prepare(self) -> None:
        self.contents = []
        for salt in range(3):
            self._save(self.room / str(salt) / "c", salt)
            self.contents.append(_contents(self.room / str(salt) / "c"))

    def _save(self, folder: Path, salt: int) -> None:
        fixed_capsule(salt=salt).save_pretrained(folder, recipe=RECIPE, metrics=METRICS)

    def reset(self, place: Path, variant: str) -> None:
        if variant != "new":
            self._save(place / "c", 0)

    def act(self, place: Path, variant: str) -> None:
        if variant == "over one, renamed twice":
            atomic_files.exchange = lambda one, other: False
        self._save(place / "c", 1)

    def check(self, place: Path, variant: str) -> None:
        if variant == "new" and not (place / "c").exists():
            return
        Capsule.from_pretrained(place / "c")
        assert _contents(place / "c") in self.contents[:2], "neither the old capsule nor the new one"

    def again(self, place: Path, variant: str) -> str:
        self._save(place / "c", 2)
        assert _contents(place / "c") == self.contents[2]
        require_listed(place, {"c"})
        return "saved"


class Stores(Target):
    """ImageStore.put into a folder of other entries, with room for all and for a third of them."""

    variants = ("roomy", "tight")
    entries = 30

    def _store(self, place: Path, variant: str) -> ImageStore:
        return ImageStore(place / "s", max_bytes=10**6 if variant == "roomy" else 50_000)

    def _put(self, store: ImageStore, numbers: Sequence[int]) -> None:
        for number in numbers:
            assert store.put(StoreKey.of({"image": number}), _bytes_of(number))

    def reset(self, place: Path, variant: str) -> None:
        self._put(self._store(place, variant), range(8))

    def act(self, place: Path, variant: str) -> None:
        self._put(self._store(place, variant), range(5, self.entries))

    def check(self, place: Path, variant: str) -> None:
        store = self._store(place, variant)
        assert store.check() == []
        for number in range(self.entries):
            assert store.get(StoreKey.of({"image": number})) in (None, _bytes_of(number)), "another image's bytes"

    def again(self, place: Path, variant: str) -> str:
        # What nobody holds locked is litter when it is a minute old.
        for file in (place / "s").glob(f".*{PARTIAL}"):
            os.utime(file, (time.time() - 90,) * 2)
        store = self._store(place, variant)
        self._put(store, range(self.entries))
        assert store.total_bytes() <= store.max_bytes and store.check() == []
        require_no_litter(place)
        return "stored"


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _bytes_of(number: int) -> bytes:
    return random.Random(number).randbytes(1000 + 300 * number)


def require_listed(folder: Path, names: set[str]) -> None:
    assert set(os.listdir(folder)) == names, f"{folder.name} holds {sorted(os.listdir(folder))}, not {sorted(names)}"


def require_no_litter(place: Path) -> None:
    """No hidden file but the lock of a store, and nothing in the folder for temporary files."""
    hidden = [path.name for path in place.rglob(".*") if path.name != ".lock"]
    temporary = os.listdir(tempfile.gettempdir())
    assert not hidden + temporary, f"left behind: {hidden + temporary}"

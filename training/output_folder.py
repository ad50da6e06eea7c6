"""The folders of a run: OUTPUT, where the capsule is saved, and OUTPUT.run with its lock, record, logs and checkpoints.

One run at a time writes to them, which the lock sees to: the system frees it when the process ends, however it ends.
Only files that a run wrote are ever removed from OUTPUT.run.
"""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from kvcapsule import atomic_files
from kvcapsule.capsule.capsule_folder import restore
from kvcapsule.capsule.trained_with import PLACES_FILE
from kvcapsule.capsule.write import require_replaceable
from kvcapsule.errors import ConfigError, InputError

from .recipe import Recipe, flat, group_names
from .run_state import CLOSED_FORM_FILE, DESCENT_FILE, require_intact

LOCK_FILE, RECORD_FILE = "lock", "run.json"
CSV_FOLDER, TENSORBOARD_FOLDER = "csv", "tensorboard"
_FILES = (
    *(LOCK_FILE, RECORD_FILE, CLOSED_FORM_FILE, DESCENT_FILE, PLACES_FILE),
    *(f"{CSV_FOLDER}/metrics.csv", f"{CSV_FOLDER}/hparams.yaml"),
    *(f"{TENSORBOARD_FOLDER}/events.out.tfevents.*", f"{TENSORBOARD_FOLDER}/hparams.yaml"),
)
"""What runs write to OUTPUT.run, as patterns."""
_REPLACED = (RECORD_FILE, CLOSED_FORM_FILE, DESCENT_FILE, PLACES_FILE)
"""Files that are written under a hidden name first."""
RUNNING, INTERRUPTED, FINISHED = "running", "interrupted", "finished"


class OutputFolder:
    """OUTPUT and OUTPUT.run of one run, which holds their lock."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.capsule, self.work = recipe, recipe.folder, recipe.work
        self.id = uuid4().hex
        self.replaces = recipe.force
        """Whether a capsule in OUTPUT may be replaced."""
        self.started = False

    def require_usable(self) -> None:
        """Check what a former run left, with the lock held.

        Raises:
            InputError: for what only --force or --resume may touch, and where there is nothing to resume. ConfigError:
                to resume with other options than the run's own.
        """
        restore(self.capsule)
        for name in _REPLACED:
            atomic_files.remove_litter(self.work / name)
        record = _record(self.work)
        if self.recipe.resume:
            self._require_resumable(record)
            self.replaces = self.replaces or bool(record.get("replaces"))
        if self.capsule.exists() and not self.replaces:
            raise InputError(f"{self.capsule} exists: choose another --output, or replace it with --force.")
        if self.capsule.exists():
            require_replaceable(self.capsule.resolve())
        if not self.recipe.resume:
            self._require_unused(record)

    def start(self) -> None:
        """Begin to write: the former run's files go, unless they are resumed from, and this run's record comes."""
        if not self.recipe.resume:
            _remove_files(self.work, keep=(LOCK_FILE,))
        self.started = True
        self._write_record(RUNNING)

    def require_unchanged(self) -> None:
        """Check before the capsule is saved that no other run or person has written here meanwhile.

        Raises:
            InputError: if one has.
        """
        if _record(self.work).get("id") != self.id:
            raise InputError(
                f"{self.work} was replaced while this run trained: another run writes to {self.capsule}, so this one"
                " saves nothing there. Train with another --output."
            )
        if self.capsule.exists() and not self.replaces:
            raise InputError(
                f"{self.capsule} was written while this run trained, and is left as it is. What was trained is kept:"
                " the same command with --resume --force replaces it."
            )

    def finish(self) -> None:
        """The capsule is saved, and what its codecs were built from is no longer needed."""
        (self.work / CLOSED_FORM_FILE).unlink(missing_ok=True)
        self._write_record(FINISHED)

    def close(self, failed: bool) -> None:
        """End of the run; a failed one without anything to resume leaves nothing behind."""
        if not failed:
            return
        if has_state(self.work):
            if self.started and _record(self.work).get("id") == self.id:
                self._write_record(INTERRUPTED)
        elif self.started:
            _remove_files(self.work)
        elif set(_entries(self.work)) <= {LOCK_FILE}:
            _remove_lock(self.work)

    def _write_record(self, state: str) -> None:
        record = {
            "id": self.id,
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": datetime.now().isoformat(" ", "seconds"),
            "replaces": self.replaces,
            "recipe": asdict(self.recipe),
        }
        with atomic_files.replacing(self.work / RECORD_FILE) as path:
            path.write_bytes(atomic_files.to_json(atomic_files.plain(record, "record")))

    def _require_unused(self, record: dict[str, Any]) -> None:
        others = [entry for entry in _entries(self.work) if entry != LOCK_FILE]
        known = {file.partition("/")[0] for file in _FILES}
        if not others:
            return
        if not record and not set(others) <= known:
            raise InputError(
                f"{self.work} is not empty and no run wrote it (it holds {', '.join(others[:5])}): move it away, or"
                " choose another --output."
            )
        if self.recipe.force:
            return
        ended = record.get("state") == FINISHED
        resume = "" if ended or not has_state(self.work) else "continue that run with --resume, or "
        raise InputError(
            f"{self.work} holds the logs and checkpoints of a former run: {resume}replace them with --force, or choose"
            " another --output."
        )

    def _require_resumable(self, record: dict[str, Any]) -> None:
        if record.get("state") == FINISHED:
            raise InputError(
                f"nothing to resume: the run of {self.work} is finished. To train anew, give --force instead."
            )
        if not record or not has_state(self.work):
            raise InputError(
                f"nothing to resume: no run in {self.work} came to the end of its closed form ({CLOSED_FORM_FILE})."
                " Start again without --resume."
            )
        groups = group_names(type(self.recipe))
        before, now = (
            dict(flat(values, groups))
            for values in (record.get("recipe", {}), atomic_files.plain(asdict(self.recipe), "recipe"))
        )
        other = [name for name, value in now.items() if name not in Recipe.RESUMABLE and before.get(name) != value]
        if other:
            raise ConfigError(
                f"the run to resume had another {', '.join(f'--{name}' for name in other)}: give the same options, or"
                " start anew with --force."
            )
        require_intact(self.work)


@contextmanager
def output_folder(recipe: Recipe) -> Iterator[OutputFolder]:
    """Hold the lock of a run's folders, and leave nothing half done there.

    Raises:
        InputError: if another run holds it, or the place cannot be written to; and as `require_usable`.
    """
    folder = OutputFolder(recipe)
    if recipe.resume and not recipe.work.is_dir():
        raise InputError(f"nothing to resume: there is no {recipe.work}.")
    lock = FileLock(recipe.work / LOCK_FILE, timeout=0)
    is_new = not (recipe.work / LOCK_FILE).exists()
    try:
        recipe.work.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(_taken_by(recipe)) from error
    except OSError as error:
        raise InputError(
            f"{recipe.work} cannot be written to: {error.strerror or error}. Choose another --output."
        ) from error
    try:
        try:
            folder.require_usable()
        except BaseException:
            if is_new:
                _remove_lock(recipe.work)
            raise
        failed = True
        try:
            yield folder
            failed = False
        finally:
            folder.close(failed)
    except OSError as error:
        if not _is_of(error, recipe.work):
            raise
        reason = atomic_files.NO_SPACE.get(error.errno or 0, error.strerror or error)
        raise InputError(f"{recipe.work} cannot be written to: {reason}.") from error
    finally:
        lock.release()


def has_state(work: Path) -> bool:
    """Whether a run left something to resume from."""
    return any((work / name).is_file() for name in (DESCENT_FILE, CLOSED_FORM_FILE))


def how_to_go_on(recipe: Recipe, command: str) -> str:
    """What an interrupted run keeps, and the command that continues it.

    Args:
        recipe: of the run.
        command: its command line.
    """
    if not has_state(recipe.work):
        return "Nothing was trained yet, and nothing is kept: the same command starts again."
    kept = "the last checkpoint" if (recipe.work / DESCENT_FILE).is_file() else "the closed form"
    again = command if recipe.resume else f"{command} --resume"
    return f"Kept in {recipe.work}: {kept}. To go on: {again}"


def _taken_by(recipe: Recipe) -> str:
    record = _record(recipe.work)
    process = f" (process {record['pid']} on {record['host']}, since {record['time']})" if "pid" in record else ""
    return f"another run{process} writes to {recipe.folder}: wait until it ends, or choose another --output."


def _is_of(error: OSError, work: Path) -> bool:
    """Whether an error is about writing to this folder; that of a full disk names no file."""
    if error.errno in atomic_files.NO_SPACE:
        return True
    named = error.filename if isinstance(error.filename, (str, os.PathLike)) else ""
    return error.errno in (errno.EACCES, errno.EROFS, errno.ENOENT) and str(named).startswith(str(work))


def _record(work: Path) -> dict[str, Any]:
    """The record of the last run; empty where there is none that can be read."""
    try:
        record = json.loads((work / RECORD_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _entries(work: Path) -> list[str]:
    return sorted(os.listdir(work)) if work.is_dir() else []


def _remove_files(work: Path, keep: tuple[str, ...] = ()) -> None:
    """Remove what runs write, and the folders that are empty then."""
    for pattern in _FILES:
        for path in work.glob(pattern):
            if path.name not in keep:
                path.unlink(missing_ok=True)
    for folder in (work / CSV_FOLDER, work / TENSORBOARD_FOLDER, *(() if keep else (work,))):
        if folder.is_dir() and not os.listdir(folder):
            folder.rmdir()


def _remove_lock(work: Path) -> None:
    """Remove the lock of a run that wrote nothing, and its folder if nothing else is in it."""
    (work / LOCK_FILE).unlink(missing_ok=True)
    if not os.listdir(work):
        work.rmdir()

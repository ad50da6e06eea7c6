"""The capsules of a suite: those that exist are loaded, the others are trained first, each by its own `kvcapsule
train`."""

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from kvcapsule.capsule.capsule import Capsule
from kvcapsule.capsule.read import CONFIG_FILE
from kvcapsule.cli.progress import Stages
from kvcapsule.cli.results import shown_path, write_whole
from kvcapsule.errors import InputError

from ..eval_config import EvalConfig
from .entries import Capsules, Spec

_RECORD = ".train"
"""Suffix of the file beside a capsule's folder that records the arguments of its training."""
_RENAMED = {
    "--ratio": "--compression",
    "--codec.key_ratio": "--codec.key-retention",
    "--codec.value_ratio": "--codec.value-retention",
    "--transform.maps": "--transform.max-map-mib",
    "--transform.readers": "--transform.query-bank",
}
"""Options of `kvcapsule train` before 0.1.0, and their names now."""


def open_trained(wanted: Sequence[Spec], folder: Path, config: EvalConfig, console: Console) -> Capsules:
    """Train the capsules that are missing, and load all.

    Args:
        wanted: entries that train capsules.
        folder: of all the capsules, each in a folder of its entry's name.
        config: names the model; its device and threads are also those of the training.
        console: where commands and progress are shown.

    Raises:
        InputError: if a capsule is missing and config.train is off, if one was trained with other arguments, or if a
        training fails. CapsuleError: if one cannot be loaded.
    """
    missing = [spec for spec in wanted if not (folder / spec.name / CONFIG_FILE).is_file()]
    for spec in wanted:
        if spec not in missing:
            _require_same(spec, folder, config)
    if missing and not config.train:
        commands = " && ".join(shlex.join(["kvcapsule", *_words(spec, folder, config)]) for spec in missing)
        raise InputError(f"{len(missing)} of the suite's capsules are missing in {folder}. Run: {commands}")
    if missing:
        _train_all(missing, folder, config, console)
    return {spec.name: (str(folder / spec.name), Capsule.from_pretrained(folder / spec.name)) for spec in wanted}


def _train_all(missing: Sequence[Spec], folder: Path, config: EvalConfig, console: Console) -> None:
    with Stages(console) as progress:
        task = progress.add_task("", total=len(missing))
        for spec in missing:
            # What a training that was interrupted left beside the folder is replaced.
            words = [*_words(spec, folder, config), "--force"]
            console.print(shlex.join(["kvcapsule", *words]), markup=False, highlight=False, soft_wrap=True)
            progress.update(task, description=f"training {spec.name}")
            _train(spec.name, words, console)
            write_whole(folder / f"{spec.name}{_RECORD}", _record(spec, config).encode())
            progress.advance(task)


def _train(name: str, words: Sequence[str], console: Console) -> None:
    """Train in another process: eval does not import training, and the process returns its memory."""
    command = [sys.executable, "-m", "kvcapsule", *words]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        console.print(done.stderr, markup=False, highlight=False, soft_wrap=True)
        *_, last = ["it said nothing", *done.stderr.strip().splitlines()]
        raise InputError(f"the training of {name} failed (exit code {done.returncode}): {last}")


def _words(spec: Spec, folder: Path, config: EvalConfig) -> list[str]:
    options = {"revision": config.revision, "device": config.device, "threads": config.threads}
    words = ["train", *spec.arguments, "--model", config.model, "--output", str(folder / spec.name)]
    return [
        *words,
        *(word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))),
    ]


def _record(spec: Spec, config: EvalConfig) -> str:
    """The arguments that decide which capsule a training gives."""
    revision = [] if config.revision is None else ["--revision", config.revision]
    return shlex.join([*spec.arguments, "--model", shown_path(config.model), *revision]) + "\n"


def _upgraded(record: str) -> str:
    """A record with today's names of the options; before 0.1.0 a ratio up to 1 was the share that is stored."""
    words = shlex.split(record)
    for i, word in enumerate(words[:-1]):
        if word == "--ratio" and float(words[i + 1]) <= 1:
            words[i + 1] = f"{1 / float(words[i + 1]):.5g}"
    return shlex.join(_RENAMED.get(word, word) for word in words) + "\n"


def _require_same(spec: Spec, folder: Path, config: EvalConfig) -> None:
    """Refuse a capsule that an earlier run trained with other arguments; one that a person copied here has no
    record."""
    record = folder / f"{spec.name}{_RECORD}"
    if record.is_file() and (recorded := _upgraded(record.read_text(encoding="utf-8"))) != (
        wanted := _record(spec, config)
    ):
        raise InputError(
            f"{folder / spec.name} was trained with `{recorded.strip()}`, but the suite asks for `{wanted.strip()}`: "
            "delete the folder to train it again, or name another one with --suite-capsules."
        )

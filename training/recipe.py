"""The options of a training run that all codec families share; a family adds its own in a subclass (families/)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcapsule.codec.blocks import require_whole_blocks
from kvcapsule.data.source_config import SourceConfig
from kvcapsule.errors import ConfigError, DataError
from kvcapsule.training_footprint import held_out_of

REFERENCE_BITS = 16
"""Bits of an element of the cache that compression is counted against, whatever precision the model runs in."""


@dataclass(frozen=True)
class TileOptions:
    """Shape of the codecs."""

    tile: int = 0
    """Visual tokens of a tile, which one map covers. 0: the whole image, as in the KVCapsule paper; the capsule then
    fits one image size. With --codec.align: the largest tile that an image of that size holds wherever it begins."""
    align: int = 1
    """Tiles begin at positions of the sequence that are multiples of this, and --codec.tile must be a multiple of it:
    the block size of an engine whose paged cache gives back the blocks that lie wholly within an image (32 or 16 in
    most). Training then cuts each question's image at a random phase. 1: tiles begin at an image's first token."""
    canonical_frame: bool = True
    """Store keys as if their tile began at position 0."""

    def __post_init__(self) -> None:
        if self.tile < 0:
            raise ConfigError(f"--codec.tile {self.tile}: it is a number of visual tokens; 0 takes the whole image.")
        require_whole_blocks(self.tile, self.align)


@dataclass(frozen=True)
class PyramidOptions(TileOptions):
    """Shape of the codecs, with a budget that falls over the layers."""

    pyramid: float = 0.0
    """Slope of the budget over the layers. 0.5: the first layer keeps 1.5 times the mean and the last 0.5 times, linear
    between; 0: all alike."""


FSDP = "fsdp"
"""--trainer.strategy that shares the frozen model out among processes."""
STRATEGIES = ("auto", "ddp", FSDP)


@dataclass(frozen=True)
class TrainerOptions:
    """Devices and processes of Lightning."""

    devices: int = 1
    """Processes (or GPUs) per node."""
    num_nodes: int = 1
    """Number of machines."""
    strategy: str = "auto"
    """What each process holds: auto or ddp, the frozen model as a whole; fsdp, a share of it, for one that is larger
    than a device."""

    @property
    def processes(self) -> int:
        """On all machines."""
        return self.devices * self.num_nodes


@dataclass(frozen=True)
class Recipe:
    """What is trained, on which questions, and where the capsule is written; every codec family adds its options in a
    subclass."""

    RESUMABLE: ClassVar[frozenset[str]] = frozenset(
        (
            "device",
            "output",
            "force",
            "resume",
            "workers",
            "threads",
            "trainer.devices",
            "trainer.num_nodes",
            "trainer.strategy",
        )
    )
    """Options that a resumed run may give anew; all others must be those of the run that it continues."""

    model: str = "pages-vlm"
    """The frozen VLM: a folder, a shipped name or an id on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    dtype: str = "auto"
    """Precision of the frozen VLM: auto (as saved), float32, float16 or bfloat16."""
    device: str | None = None
    """Device of the model, such as cpu or cuda:1. Default: CUDA if present."""
    family: str = "cross-layer"
    """The codec family: one that `kvcapsule methods` lists and that can be trained, or module:ATTRIBUTE of a
    kvcapsule.codec.CodecFamily."""
    compression: float = 2.5
    """How many times fewer bytes are stored than at 16 bits an element; at least 1."""
    codec: TileOptions = field(default_factory=TileOptions)
    """Shape of the codecs."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(size=2048))
    """Where questions and answers come from."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    """Devices and processes."""
    held_out: int | None = None
    """Questions on which reconstruction is measured: the last ones of the source, which are never trained on. Default:
    64, or a fifth of fewer than 320."""
    batch: int = 16
    """Questions in one training batch."""
    words_before: int = 0
    """Most words before the image of each training question: a random number of them, taken from other questions. For
    capsules that will read images behind other text than the data's: keys and values of visual tokens depend on it."""
    moment_batches: int = 40
    """Batches for the closed-form parts (PCA, first reconstruction)."""
    harvests: str | None = None
    """Folder that caches the keys, values and queries of each batch, for later runs of any family and compression on
    the same model and data, which then need not run the model for them. The first run says how large it is."""
    workers: int = 0
    """Processes that prepare batches."""
    threads: int | None = None
    """CPU threads. Default: PyTorch's choice."""
    seed: int = 0
    """Random seed of the run."""
    output: str = "runs/capsule"
    """Folder of the capsule. Logs and checkpoints are written to a folder of the same name plus .run."""
    force: bool = False
    """Replace the capsule in the output folder, and the logs and checkpoints of the run that made it."""
    resume: bool = False
    """Continue an interrupted run with the same output: from its last checkpoint, or behind its closed form."""

    def __post_init__(self) -> None:
        if not 1 <= self.compression < float("inf"):
            raise ConfigError(
                f"--compression {self.compression}: give a number of at least 1, how many times fewer bytes are stored."
            )
        for name, count in (
            ("batch", self.batch),
            ("moment_batches", self.moment_batches),
            ("held_out", 1 if self.held_out is None else self.held_out),
            ("trainer.devices", self.trainer.devices),
            ("trainer.num_nodes", self.trainer.num_nodes),
        ):
            if count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")
        if self.workers < 0:
            raise ConfigError(f"--workers {self.workers}: it is a number of processes, 0 or more.")
        if not self.data.source:
            raise ConfigError("--data.source is empty: name a source of questions.")
        _ = self.folder
        if self.words_before < 0:
            raise ConfigError(f"--words_before {self.words_before}: it is a number of words, 0 or more.")

    def trained_of(self, questions: int) -> int:
        """How many of the source's questions are trained on: the first ones, the others are held out.

        Raises:
            DataError: if none is left to train on.
        """
        held_out = held_out_of(questions) if self.held_out is None else self.held_out
        if questions <= held_out:
            counted = "1 question" if questions == 1 else f"{questions} questions"
            lower = f"lower --held_out to at most {questions - 1} or " if questions > 1 else ""
            raise DataError(
                f"{counted} cannot spare {held_out} to measure on, and training needs one more at least: {lower}give"
                " more data."
            )
        return questions - held_out

    @property
    def retention(self) -> float:
        """Share that is stored, in (0, 1]: the inverse of the compression."""
        return 1 / self.compression

    @property
    def folder(self) -> Path:
        """Folder of the capsule, without ~, .. or a slash at its end.

        Raises:
            ConfigError: if `output` names no folder of its own.
        """
        try:
            folder = Path(self.output).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"--output {self.output}: there is no such user; write the folder out.") from error
        if ".." in folder.parts:
            folder = folder.resolve()
        if not self.output.strip() or not folder.name:
            raise ConfigError(f"--output {self.output!r} names no folder of its own: give one, such as runs/capsule.")
        return folder

    @property
    def work(self) -> Path:
        """Folder of logs and checkpoints."""
        return self.folder.with_name(f"{self.folder.name}.run")


def require_at_least_zero(options: object, prefix: str, *names: str) -> None:
    """Raises ConfigError that names the first of these options that is set and is negative or no finite number."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"--{prefix}.{name} {value}: 0 or more is needed.")


def option_names(options: type[Any], prefix: str = "") -> Iterator[str]:
    """The options of a recipe class as the command line spells them, `codec.tile`; groups too, `codec`."""
    for option in fields(options):
        yield prefix + option.name
        if isinstance(option.type, type) and is_dataclass(option.type):
            yield from option_names(option.type, f"{prefix}{option.name}.")


def flat(values: Mapping[str, Any], groups: frozenset[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options and their values as the command line spells them, of a nested mapping.

    Args:
        values: of a recipe, or of a part of one.
        groups: names that stand for groups of options and not for options.
        prefix: of the names.
    """
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name in groups:
            yield from flat(value, groups, f"{name}.")
        else:
            yield name, value


def group_names(options: type[Any]) -> frozenset[str]:
    """Those of `option_names` that have options under them."""
    names = set(option_names(options))
    return frozenset(name.rpartition(".")[0] for name in names if "." in name)

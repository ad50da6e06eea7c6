"""The options of a training run that all codec families share; a family adds its own in a subclass (families/)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar

from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import ConfigError

REFERENCE_BITS = 16
"""Bits of an element of the cache that compression is counted against, whatever precision the model runs in."""


@dataclass(frozen=True)
class TileOptions:
    """Shape of the codecs."""

    tile: int = 0
    """Visual tokens that one map covers; 0 takes the whole image, as the KVCapsule paper does, which ties the capsule
    to one image size."""
    canonical_frame: bool = True
    """Store keys as if their tile began at position 0."""


@dataclass(frozen=True)
class PyramidOptions(TileOptions):
    """Shape of the codecs."""

    pyramid: float = 0.0
    """How much more the first layer keeps than the mean, as a fraction of it (and the last layer less): 0 is
    uniform."""


@dataclass(frozen=True)
class TrainerOptions:
    """Where Lightning runs the training."""

    devices: int = 1
    """Processes (or GPUs) of each node."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """Lightning's strategy: auto or ddp."""


@dataclass(frozen=True)
class Recipe:
    """A training run of `kvcapsule train`; each codec family has a subclass with options of its own."""

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
    """Its revision on the Hub."""
    dtype: str = "auto"
    """Precision of the frozen VLM: auto, float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs; None takes a GPU where there is one."""
    family: str = "cross-layer"
    """The codec family: one that `kvcapsule methods` lists and that can be trained, or module:ATTRIBUTE of a
    kvcapsule.codec.CodecFamily."""
    ratio: float = 0.4
    """How much is stored: in (0, 1] the share of what there was; from 2 on how many times less. 0.05 and 20 are the
    same."""
    codec: TileOptions = field(default_factory=TileOptions)
    """Shape of the codecs."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(size=2048))
    """Where questions and answers come from."""
    trainer: TrainerOptions = field(default_factory=TrainerOptions)
    """Devices and processes."""
    held_out: int = 64
    """Questions set aside to measure reconstruction on (the last of the source, never trained on)."""
    batch: int = 16
    """Questions a step."""
    moment_batches: int = 40
    """Batches that the closed-form parts (PCA, first reconstruction) are computed from."""
    harvests: str | None = None
    """Folder that caches the keys, values and queries of each batch, for later runs of any family and ratio on the
    same model and data, which then need not run the model for them; they are large (the first run says how large).
    Without it they are computed when needed."""
    workers: int = 0
    """Processes that prepare batches."""
    threads: int | None = None
    """CPU threads; None leaves it to torch."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs/capsule"
    """The capsule's folder. Logs and checkpoints go to a folder of the same name with .run at its end."""
    force: bool = False
    """Replace a capsule that is at output."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same output."""

    def __post_init__(self) -> None:
        if not (0 < self.ratio <= 1 or self.ratio >= 2):
            raise ConfigError(
                f"--ratio {self.ratio}: give the retention ratio in (0, 1] (0.05 stores a twentieth), or from 2 on how"
                " many times less is stored (20 is the same)."
            )
        for name, count in (
            ("batch", self.batch),
            ("moment_batches", self.moment_batches),
            ("held_out", self.held_out),
        ):
            if count < 1:
                raise ConfigError(f"--{name} {count}: at least 1 is needed.")

    @property
    def retention(self) -> float:
        """What is stored / what there was, in (0, 1]."""
        return self.ratio if self.ratio <= 1 else 1 / self.ratio

    @property
    def work(self) -> Path:
        """Folder of logs and checkpoints."""
        return Path(self.output + ".run")


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

"""Make smol-vlm from its two packages and the trained weights that are shipped: `python -m
kvcapsule.training.testbeds.smol_vlm.make`."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

from kvcapsule import checkpoints
from kvcapsule.errors import PackageError

from .assemble import pretrained_halves, save
from .language import SmolError
from .weights import put_on, require_trained


@dataclass
class MakeConfig:
    """Where smol-vlm is made."""

    output: str = "runs/smol-vlm"
    """Where the model and its processor go; 550 MB."""
    trained: str | None = str(checkpoints.HERE / "smol-vlm")
    """Folder with the trained connector and LoRA; null leaves the connector untrained, and the model blind."""


def main(config: MakeConfig) -> None:
    """Fetch, convert, join, and put the trained weights on.

    Raises:
        PackageError: if a package cannot be fetched.
        SmolError: if the gguf package or the trained weights are missing.
    """
    if config.trained is not None:
        require_trained(Path(config.trained))
    vlm, processor = pretrained_halves()
    if config.trained is not None:
        vlm = put_on(vlm, Path(config.trained))
    save(vlm, processor, Path(config.output))
    print(f"smol-vlm is in {config.output}: kvcapsule eval --model {config.output} --data.source emoji")


if __name__ == "__main__":
    try:
        main(auto_cli(MakeConfig, as_positional=False))
    except (PackageError, SmolError) as error:
        raise SystemExit(f"smol-vlm cannot be made: {error}") from error

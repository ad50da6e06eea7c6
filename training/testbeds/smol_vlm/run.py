"""Training run of smol-vlm's connector and LoRA: `python -m kvcapsule.training.testbeds.smol_vlm.run`; a restart
resumes at the last checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.loggers import CSVLogger
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from kvcapsule.errors import ConfigError

from ..stage import NumberedSamples, Stage, fit
from .assemble import pretrained_halves
from .stages import NameStage, ReadStage
from .turns import Mixture, NameCollator, TurnCollator, token_classes
from .weights import add_lora, save_trained


@dataclass
class SmolVlmConfig:
    """Options of the training run."""

    output: str = "checkpoints/smol-vlm"
    """Folder for the connector and the LoRA."""
    work: str = "runs/smol-vlm-training"
    """Folder for Lightning's checkpoints and logs."""
    name_steps: int = 1500
    """Steps of the naming stage: visual tokens learn the names of the objects shown; the language model does not
    run."""
    connector_steps: int = 100
    """Steps of stage 1: the connector through the frozen language model."""
    lora_steps: int = 550
    """Steps of stage 2: the connector and a LoRA."""
    name_batch: int = 16
    """Pictures per step of the naming stage."""
    batch: int = 8
    """Pictures per step of stages 1 and 2, with up to nine questions each."""
    at_once: int = 1
    """Pictures per forward in stages 1 and 2; on a CPU a larger number takes more memory and no less time."""
    rank: int = 8
    """Rank of the LoRA."""
    name_lr: float = 2e-3
    """Learning rate of the naming stage."""
    connector_lr: float = 1e-3
    """Learning rate of stage 1."""
    lora_lr: float = 5e-4
    """Learning rate of stage 2."""
    every: int = 50
    """Steps between checkpoints."""
    threads: int = 1
    """CPU threads."""
    accelerator: str = "cpu"
    """Lightning's accelerator, "cpu" or "gpu"."""
    attention: str = "eager"
    """Attention of the language model; with a mask on the CPU, "eager" takes a quarter less time than "sdpa"."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("name_steps", "connector_steps", "lora_steps"):
            if getattr(self, name) % self.every:
                raise ConfigError(f"{name} {getattr(self, name)} must be a multiple of every {self.every}.")
        if self.batch % self.at_once:
            raise ConfigError(f"batch {self.batch} must be a multiple of at_once {self.at_once}.")


def main(config: SmolVlmConfig) -> None:
    """Train with the models and data of the packages."""
    vlm, processor = pretrained_halves()
    train(config, vlm, processor, Mixture())


def train(config: SmolVlmConfig, vlm: LlavaForConditionalGeneration, processor: LlavaProcessor, draw: Mixture) -> None:
    """Run the three stages, each of which can resume, and write the connector and the LoRA."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(config.threads)
    L.seed_everything(config.seed)
    work, tokenizer = Path(config.work), processor.tokenizer
    vision: Any = vlm.config.vision_config
    grid = vision.image_size // vision.patch_size
    # bfloat16 saves casting the frozen weights at every step; the connector and the LoRA stay in float32.
    vlm.model.language_model.bfloat16()
    vlm.tie_weights()
    vlm.set_attn_implementation({"text_config": config.attention})
    names, turns = NameCollator(processor, draw, grid), TurnCollator(processor, draw, grid * grid)

    def numbered(collate: NameCollator | TurnCollator, batch: int, at_once: int) -> NumberedSamples:
        return NumberedSamples(lambda _: collate, first, batch, config.every, at_once=at_once)

    first = 0
    if config.name_steps:
        stage: Stage = NameStage(vlm, tokenizer, token_classes(), config.name_steps, config.name_lr)
        _fit(stage, numbered(names, config.name_batch, config.name_batch), work / "names", config)
        first += config.name_steps * config.name_batch
    if config.connector_steps:
        samples = numbered(turns, config.batch, config.at_once)
        _fit(ReadStage(vlm, config.connector_steps, config.connector_lr), samples, work / "connector", config)
        first += config.connector_steps * config.batch
    lora = None
    if config.lora_steps:
        lora = add_lora(vlm, config.rank)
        samples = numbered(turns, config.batch, config.at_once)
        _fit(ReadStage(vlm, config.lora_steps, config.lora_lr), samples, work / "lora", config)
    save_trained(vlm, lora, Path(config.output))


def _fit(stage: Stage, samples: NumberedSamples, work: Path, config: SmolVlmConfig) -> None:
    stage.train()
    fit(
        stage,
        samples,
        work,
        accelerator=config.accelerator,
        devices=1,
        precision="bf16-mixed",
        # Not max_steps, with which Lightning repeats part of an epoch after a restart.
        max_epochs=stage.steps // config.every,
        accumulate_grad_batches=config.batch // config.at_once if isinstance(stage, ReadStage) else 1,
        # One version per start, because a logger deletes earlier logs in its folder.
        logger=CSVLogger(work, name="log"),
        log_every_n_steps=10,
    )


if __name__ == "__main__":
    main(auto_cli(SmolVlmConfig, as_positional=False))

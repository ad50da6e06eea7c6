"""Training run of pages-vlm: `python -m kvcapsule.training.testbeds.pages_vlm.run`; a restart resumes at the last
checkpoint."""

import os
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from jsonargparse import auto_cli
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from ..stage import Collate, NumberedSamples, Stage, fit
from .data import PatchCollator, TurnCollator
from .model import build_model, build_processor
from .stages import PatchStage, ReaderStage

EPOCH = 100
"""Steps between checkpoints."""
EASY_LINES = (1, 3)
"""Smallest and largest number of lines of the easy pages at the beginning of stage 2."""


@dataclass
class DemoVlmConfig:
    """Options of the training run."""

    output: str = "runs/pages-vlm/model"
    """Folder for the trained model and its processor."""
    work: str = "runs/pages-vlm"
    """Folder for Lightning's checkpoints and logs."""
    start: str | None = None
    """Folder with a trained model to continue from, such as checkpoints/pages-vlm; skips stage 1 and the easy pages."""
    patch_steps: int = 2300
    """Steps of stage 1 (what each patch shows)."""
    reader_steps: int = 6000
    """Steps of stage 2 (the questions)."""
    easy_steps: int = 600
    """The first so many of them are on easy pages, of few lines."""
    patch_batch: int = 32
    """Pages a step of stage 1."""
    batch: int = 16
    """Pages a step of stage 2, with nine questions each."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0


def main(config: DemoVlmConfig) -> None:
    """Train pages-vlm and save it."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(config.threads)
    L.seed_everything(config.seed)
    if config.start is None:
        processor = build_processor()
        vlm = build_model(processor.tokenizer, config.seed)
    else:
        processor = LlavaProcessor.from_pretrained(config.start)
        vlm = LlavaForConditionalGeneration.from_pretrained(config.start).train()
    work = Path(config.work)
    patches, easy, turns = PatchCollator(processor), TurnCollator(processor, EASY_LINES), TurnCollator(processor)
    if config.start is None:
        samples = NumberedSamples(
            lambda _: patches, 0, config.patch_batch, EPOCH, at_once=config.patch_batch, workers=1
        )
        _fit(PatchStage(vlm, config.patch_steps), samples, work / "patches")

    def collate(step: int) -> Collate:
        return easy if config.start is None and step < config.easy_steps else turns

    first = config.patch_steps * config.patch_batch
    samples = NumberedSamples(collate, first, config.batch, EPOCH, at_once=config.batch, workers=1)
    _fit(ReaderStage(vlm, config.reader_steps), samples, work / "reader")
    save(vlm, processor, Path(config.output))


def _fit(stage: Stage, samples: NumberedSamples, work: Path) -> None:
    fit(stage, samples, work, accelerator="cpu", max_steps=stage.steps, log_every_n_steps=20)


def save(vlm: LlavaForConditionalGeneration, processor: LlavaProcessor, output: Path) -> None:
    """Write the model and its processor to a folder."""
    output.mkdir(parents=True, exist_ok=True)
    vlm.save_pretrained(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    main(auto_cli(DemoVlmConfig, as_positional=False))

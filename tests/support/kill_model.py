"""The VLM and the capsule of the runs that are killed (tests/fuzz/kills.py): small, untrained, the same in each run."""

from pathlib import Path

from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from kvcapsule import Capsule, CapsuleConfig
from kvcapsule.codec.identity import IdentityConfig
from kvcapsule.training.testbeds.pages_vlm.model import build_model, build_processor
from kvcapsule.vlm.geometry import KVGeometry


def save_model(folder: Path) -> str:
    """Save pages-vlm with random weights, unless it is there; its path."""
    disable_progress_bar()
    if not folder.exists():
        processor = build_processor()
        build_model(processor.tokenizer, seed=1).eval().save_pretrained(folder)
        processor.save_pretrained(folder)
    return str(folder)


def save_capsule(folder: Path, model: str) -> None:
    """Save a capsule for it that stores everything, with a measurement of training.

    Args:
        folder: of the capsule.
        model: what `save_model` returned.
    """
    geometry = KVGeometry.from_config(AutoConfig.from_pretrained(model))
    capsule = Capsule(CapsuleConfig("identity", IdentityConfig(49), geometry, "tiny"))
    capsule.save_pretrained(folder, metrics={"train": {"loss": 0.5}})

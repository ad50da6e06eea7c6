"""The processes of a run before they have met: how many were started, and which device is each one's."""

import os

import torch

from kvcapsule.errors import ConfigError

from .recipe import FSDP, STRATEGIES, Recipe

_AUTO = "auto"
"""--device that splits a model over the devices of a machine."""


def require_processes(recipe: Recipe) -> None:
    """Check that a run's processes can work together.

    Raises:
        ConfigError: if torchrun started another number of them than the options say, or they cannot share the model out
            as is asked for.
    """
    trainer, started = recipe.trainer, int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.strategy not in STRATEGIES:
        raise ConfigError(f"--trainer.strategy {trainer.strategy}: choose {', '.join(STRATEGIES)}.")
    if torch.distributed.is_torchelastic_launched() and started != trainer.processes:
        raise ConfigError(
            f"torchrun started {started} processes, and --trainer.devices {trainer.devices} on --trainer.num-nodes"
            f" {trainer.num_nodes} are {trainer.processes}: give those of one machine, and the machines."
        )
    if recipe.device == _AUTO and trainer.processes > 1:
        raise ConfigError(
            "--device auto splits the model over all devices of a machine, for one process: leave out"
            " --trainer.devices and --trainer.num-nodes, or --device."
        )
    if recipe.harvests is not None and (recipe.device == _AUTO or trainer.strategy == FSDP):
        raise ConfigError(
            "--harvests is for a model that lies on one device: leave it out, or --device auto and --trainer.strategy"
            " fsdp."
        )


def own_device(recipe: Recipe) -> str | None:
    """Where this process loads the model: where it is told to, else each on a GPU of its own; one that is shared out
    afterwards in the host's memory. None: as the loader chooses."""
    if recipe.trainer.strategy == FSDP:
        return "cpu"
    local = os.environ.get("LOCAL_RANK")
    if recipe.device is not None:
        return recipe.device
    return None if local is None or not torch.cuda.is_available() else f"cuda:{local}"

"""What is refused before processes meet, and where each of them loads the model."""

from typing import Any

import pytest
import torch

from kvcapsule.errors import ConfigError
from kvcapsule.training.launch import own_device, require_processes
from kvcapsule.training.options import parse


def recipe(*words: str) -> Any:
    return parse(["transform", *words], lambda line: None)


@pytest.mark.parametrize(
    ("words", "started", "message"),
    [
        (["--trainer.strategy", "deepspeed"], None, "deepspeed: choose auto, ddp, fsdp"),
        ([], "2", "torchrun started 2 processes, and --trainer.devices 1 on --trainer.num-nodes 1 are 1"),
        (["--trainer.devices", "2", "--trainer.num-nodes", "2"], "2", "are 4: give those of one machine"),
        (["--device", "auto", "--trainer.devices", "2"], None, "--device auto splits the model over all devices"),
        (["--device", "auto", "--harvests", "h"], None, "--harvests is for a model that lies on one device"),
        (["--trainer.strategy", "fsdp", "--harvests", "h"], None, "--harvests is for a model that lies on one device"),
    ],
)
def test_refused(words: list[str], started: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if started is not None:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
        monkeypatch.setenv("WORLD_SIZE", started)
    with pytest.raises(ConfigError, match=message):
        require_processes(recipe(*words))


def test_processes_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "8")
    require_processes(recipe("--trainer.devices", "4", "--trainer.num-nodes", "2"))


@pytest.mark.parametrize(
    ("words", "local", "gpus", "expected"),
    [
        ([], None, True, None),
        ([], "3", True, "cuda:3"),
        ([], "3", False, None),
        (["--device", "cpu"], "3", True, "cpu"),
        (["--device", "auto"], None, True, "auto"),
        (["--trainer.strategy", "fsdp"], "3", True, "cpu"),
    ],
)
def test_every_process_loads_onto_a_gpu_of_its_own(
    words: list[str], local: str | None, gpus: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert own_device(recipe(*words)) == expected

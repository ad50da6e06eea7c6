"""Harvests on disk: what is read back is what was written, and what is asked for is never another's."""

import copy
import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BatchFeature

from kvcapsule.atomic_files import unique_name
from kvcapsule.capsule.capsule import Capsule
from kvcapsule.data.prompts import conversation, encode
from kvcapsule.testbeds import pages
from kvcapsule.training import harvest_store
from kvcapsule.training.datamodule import Shares
from kvcapsule.training.harvest import LayerHarvest, harvest
from kvcapsule.training.harvest_store import HarvestStore
from kvcapsule.training.main import main


@pytest.fixture(scope="module")
def batch(processor):
    rows = pages.pages("train", 2)
    return encode(processor, [conversation([r["image"]], r["prompt"], r["answer"]) for r in rows])


def _tensors(layer: LayerHarvest) -> list[torch.Tensor]:
    own = [getattr(layer, f.name) for f in fields(layer) if isinstance(getattr(layer, f.name), torch.Tensor)]
    frame = () if layer.frame is None else layer.frame.tensors()
    return [*own, *frame, layer.rest.keys, layer.rest.values, layer.rest.owner, layer.rest.mask]


@pytest.mark.parametrize("canonical", [True, False])
def test_what_is_read_back_is_what_was_made(model, batch, tmp_path, monkeypatch, canonical: bool) -> None:
    expected = harvest(model, batch, 50, canonical)
    kept = HarvestStore(tmp_path / "kept", model, 50, canonical)
    kept.harvest(batch)
    monkeypatch.setattr(harvest_store, "harvest", None)
    for mine, own in zip(kept.harvest(batch), expected, strict=True):
        assert mine.scale == own.scale and (mine.frame is None) == (own.frame is None) == (not canonical)
        for a, b in zip(_tensors(mine), _tensors(own), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_the_next_run_removes_what_a_killed_one_left(model, batch, tmp_path, monkeypatch) -> None:
    """Of other batches too; the partial file of a process that lives stays."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = []
    for process in (ended.pid, os.getppid()):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        names.append(f"{unique_name(tmp_path / f'0123{harvest_store._SUFFIX}')}.partial")
        (tmp_path / names[-1]).write_bytes(b"half")
    kept = HarvestStore(tmp_path, model, 50, True)
    kept.harvest(batch)
    assert sorted(os.listdir(tmp_path)) == sorted([names[1], kept.path(batch).name])


def test_every_thing_that_a_harvest_depends_on_names_it(model, batch, tmp_path) -> None:
    kept = HarvestStore(tmp_path, model, 50, True)
    brighter = {**batch, "pixel_values": batch["pixel_values"] + 1e-3}
    names = {kept.path(batch), kept.path(brighter), HarvestStore(tmp_path, model, 49, True).path(batch)}
    names |= {HarvestStore(tmp_path, model, 50, False).path(batch)}
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0, 0] += 1
        names |= {HarvestStore(tmp_path, model, 50, True).path(batch)}
        weight[0, 0] -= 1
    assert len(names) == 5
    assert HarvestStore(tmp_path, model, 50, True).path(batch) in names


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_model_of_equal_tensors_that_computes_otherwise_has_other_harvests(model, batch, tmp_path) -> None:
    """Another rope theta or epsilon, another active adapter: the state dict says nothing of them."""
    model = copy.deepcopy(model)
    kept = HarvestStore(tmp_path, model, 50, True)
    names = [kept.path(batch)]
    text = model.config.get_text_config()
    for change in ({"rms_norm_eps": 1e-3}, {"rope_parameters": {**text.rope_parameters, "rope_theta": 123.0}}):
        for name, value in change.items():
            setattr(text, name, value)
        names.append(kept.path(batch))
    tuned = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    kept = HarvestStore(tmp_path, model, 50, True)
    for adapter in ("default", "other"):
        tuned.set_adapter(adapter)
        names.append(kept.path(batch))
    with tuned.disable_adapter():
        names.append(kept.path(batch))
    assert len(set(names)) == len(names) == 6


def test_half_of_a_file_is_never_there(model, batch, tmp_path, monkeypatch) -> None:
    def fail(tensors, path, about) -> None:
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr(harvest_store, "save_file", fail)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"no harvest can be kept in .*: Not a directory. Free some space"):
        HarvestStore(tmp_path / "file" / "kept", model, 50, True)
    (tmp_path / "file").unlink()
    kept = HarvestStore(tmp_path, model, 50, True)
    with pytest.raises(ValueError, match=r"no harvest can be kept in .*: the disk is full. Free some space"):
        kept.harvest(batch)
    assert list(tmp_path.iterdir()) == []
    kept.path(batch).write_bytes(b"what another program left")
    with pytest.raises(ValueError, match=r"cannot be read: .* Delete it"):
        kept.harvest(batch)


def test_the_first_harvest_says_how_large_it_is(model, batch, tmp_path) -> None:
    said: list[str] = []
    kept = HarvestStore(tmp_path, model, 50, True, said.append)
    kept.harvest(batch)
    kept.harvest(BatchFeature({**batch, "pixel_values": batch["pixel_values"] + 1e-3}))
    size = kept.path(batch).stat().st_size / len(batch["input_ids"])
    assert said == [f"harvests are kept in {tmp_path}: {size / 2**20:.1f} MiB a question"]


@pytest.mark.parametrize("family", ["transform", "cross-layer", "kvcapsule", "compact"])
def test_capsules_of_all_families_learn_from_it(vlm, tmp_path, monkeypatch, family: str) -> None:
    """The second run finds all, and what it learns is what a run without a store learns."""
    quick = [
        family,
        "--data.size",
        "36",
        "--held_out",
        "4",
        "--batch",
        "4",
        "--moment_batches",
        "8",
        "--model",
        vlm,
        "--device",
        "cpu",
    ]
    quick += ["--codec.tile", "49", "--compression", "10"]
    coded = ["--transform.steps", "1", "--transform.kl_weight", "0"]
    quick += {
        "transform": coded,
        "cross-layer": coded,
        "kvcapsule": ["--optim.soft_steps", "1", "--optim.hard_steps", "1", "--optim.kl_weight", "0"],
        "compact": ["--compact.bank", "16"],
    }[family]
    quick = ["kvcapsule-paper", *quick[1:]] if family == "kvcapsule" else quick
    runs = {
        "own": [],
        "first": ["--harvests", str(tmp_path / "kept")],
        "second": ["--harvests", str(tmp_path / "kept")],
    }
    made: list[int] = []
    monkeypatch.setattr(harvest_store, "harvest", lambda *given: made.append(0) or harvest(*given))
    counts = []
    for name, options in runs.items():
        assert main([*quick, "--output", str(tmp_path / name), *options]) == 0
        counts.append(len(made))
    # Eight batches to learn from, and one held out where the model need not run for its logits.
    batches = 8 if family in ("transform", "cross-layer") else 9
    assert counts == [0, batches, batches] and len(list((tmp_path / "kept").iterdir())) == batches
    own, *others = (Capsule.from_pretrained(tmp_path / name).state_dict() for name in runs)
    for other in others:
        for name, tensor in own.items():
            # What was stored lies elsewhere in memory: on some CPUs sums differ in their last bits by that.
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_later_epochs_have_the_batches_that_are_kept() -> None:
    """The same ones in another order, which loses no row; without a store every epoch cuts its own."""
    for fixed in (True, False):
        shares = Shares(30, 4, seed=1, fixed=fixed)
        shares.run(0, 21)
        steps = [tuple(step) for step in shares]
        epochs = [steps[:7], steps[7:14], steps[14:]]
        assert all(len(steps) == 7 and len({row for step in steps for row in step}) == 28 for steps in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
        assert (set(epochs[0]) == set(epochs[1]) == set(epochs[2])) == fixed
    assert list(Shares(30, 4, seed=1, fixed=True)) == list(Shares(30, 4, seed=1))

"""What a run records in its capsule: the model, the data, the rows that were read, and no path of this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.own_data import jsonl_of_pages

from kvcapsule import Capsule, attach
from kvcapsule.capsule.trained_with import PLACES_FILE, trained_with
from kvcapsule.capsule.training_rows import Seen, TrainingRows
from kvcapsule.data import source
from kvcapsule.data.batches import question_batches
from kvcapsule.data.row_digest import row_digest
from kvcapsule.data.source import SourceConfig
from kvcapsule.errors import InputError, ModelMismatchWarning
from kvcapsule.testbeds import pages
from kvcapsule.training.families.kvcapsule import KVCapsuleFit
from kvcapsule.training.main import main
from kvcapsule.vlm.loading import load_vlm

QUICK = ["--held_out", "8", "--batch", "4", "--moment_batches", "2", "--device", "cpu", "--codec.tile", "49"]
STEPS = ["--optim.soft_steps", "2", "--optim.hard_steps", "1"]


def train(output: Path, *words: str) -> Path:
    assert main(["kvcapsule", "--output", str(output), *QUICK, *STEPS, *words]) == 0
    return output


@pytest.fixture(scope="module")
def trained(vlm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capsule of a model in a folder and of questions in a file."""
    place = tmp_path_factory.mktemp("trained")
    data = ["--data.source", jsonl_of_pages(place / "own.jsonl", 40), "--data.prompt", "question"]
    return train(place / "capsule", "--model", vlm, *data)


def test_no_file_names_a_place(trained: Path, vlm: str) -> None:
    for file in trained.iterdir():
        content = file.read_bytes()
        for place in (str(trained.parent), vlm, str(Path.home())):
            assert place.encode() not in content, file.name
    config = json.loads((trained / "config.json").read_text())
    assert config["base_model"] == Path(vlm).name and config["metadata"]["model"]["local"]
    assert config["metadata"]["data"]["source"] == "own.jsonl" and config["metadata"]["data"]["prompt"] == "question"
    recipe = (trained / "recipe.yaml").read_text()
    assert f"model: {Path(vlm).name}\n" in recipe and "source: own.jsonl\n" in recipe and "output: capsule\n" in recipe
    card = (trained / "README.md").read_text()
    assert "license" not in card.split("---")[1] and "base_model" not in card.split("---")[1]


def test_its_own_model_is_taken_in_strict(trained: Path, vlm: str) -> None:
    with attach(load_vlm(vlm)[0], Capsule.from_pretrained(trained), strict=True):
        pass


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_model_with_an_active_adapter_is_recorded_with_it(vlm: str, tmp_path: Path) -> None:
    """transformers loads the adapter in a model's folder with the model."""
    torch.manual_seed(0)
    folder = shutil.copytree(vlm, tmp_path / "vlm")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False)
    get_peft_model(load_vlm(vlm)[0], lora).save_pretrained(str(folder))
    capsule = Capsule.from_pretrained(train(tmp_path / "c", "--model", str(folder), "--data.size", "40"))
    assert capsule.config.metadata["model"]["adapter"]
    with attach(load_vlm(str(folder))[0], capsule, strict=True):
        pass
    with (
        pytest.warns(ModelMismatchWarning, match="with an adapter, and none is active"),
        attach(load_vlm(vlm)[0], capsule),
    ):
        pass


def test_model_and_data_are_known_where_they_lay(trained: Path, vlm: str, tmp_path: Path) -> None:
    known = trained_with(trained)
    data = known.data()
    assert known.model() == vlm and known.revision is None
    assert data["source"] == str(trained.parent / "own.jsonl") and data["prompt"] == "question"
    assert data["split"] == "test" and not {"size", "seed"} & set(data)
    # The same capsule where the run's folder is not beside it.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in trained.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=rf"moved was trained with the model in '{Path(vlm).name}'.*give --model"):
        trained_with(moved).model()
    (tmp_path / "moved.run").mkdir()
    (tmp_path / "moved.run" / PLACES_FILE).write_text(json.dumps({"model": vlm}))
    with pytest.raises(InputError, match=r"the data in 'own\.jsonl'.*give --data\.source"):
        trained_with(moved).data()
    assert trained_with(moved).model() == vlm


def test_shipped_capsules_are_of_the_shipped_model() -> None:
    known = trained_with("pages-vlm-cross-layer")
    assert known.model() == "pages-vlm" and known.data().get("source", "pages") == "pages"


def digests(rows: object) -> list[int]:
    return [row_digest(question) for batch in question_batches(rows, 16) for question in batch]


def test_the_rows_that_were_read_are_recorded_and_no_others(trained: Path) -> None:
    """3 steps of 4 rows, 2 batches of which the closed form reads too; 8 of the split's 36 rows are held out."""
    rows = TrainingRows.in_folder(trained)
    assert rows is not None and rows.total == 12
    config = SourceConfig(source=str(trained.parent / "own.jsonl"), prompt="question", size=40)
    everything = digests(source.load(config))
    assert rows.seen(everything) == Seen(12, 36) and rows.seen(everything[-8:]) == Seen(0, 8)
    assert rows.seen(digests(pages.pages("test", 8))) == Seen(0, 8)


def test_a_resumed_run_records_what_it_read_before(vlm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its closed form, which is not run again, and in the steps behind the last checkpoint."""
    words = ["--model", vlm, "--data.size", "40", "--moment_batches", "2", "--optim.soft_steps", "2"]
    step = KVCapsuleFit.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(KVCapsuleFit, "training_step", interrupted)
    assert main(["kvcapsule", "--output", str(tmp_path / "c"), *QUICK, *STEPS, *words]) == 130
    monkeypatch.undo()
    resumed = TrainingRows.in_folder(train(tmp_path / "c", *words, "--resume"))
    whole = TrainingRows.in_folder(train(tmp_path / "whole", *words))
    assert resumed is not None and whole is not None
    assert resumed.digests.tolist() == whole.digests.tolist() and whole.total == 12

"""The log of smol-vlm's training as one table and one picture."""

from pathlib import Path

import pytest
from PIL import Image

from kvcapsule.errors import InputError
from kvcapsule.training.testbeds.smol_vlm.curves import CurvesConfig, main, rows_of


def log(folder: Path, stage: str, version: int, text: str) -> None:
    place = folder / stage / "log" / f"version_{version}"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(text)


def test_stages_follow_each_other_and_a_restart_replaces_what_it_ran_again(tmp_path: Path) -> None:
    log(tmp_path, "names", 0, "epoch,loss,named,step\n0,4.0,0.1,9\n0,3.0,0.25,19\n0,9.0,0.9,29\n")
    log(tmp_path, "names", 2, "epoch,loss,named,step\n0,2.5,0.5,19\n")
    log(tmp_path, "names", 10, "epoch,loss,named,step\n0,1.5,0.123456,29\n")
    log(tmp_path, "lora", 0, "emoji-place,epoch,loss,step\n,0,0.7,49\n0.5,0,,49\n")
    main(CurvesConfig(str(tmp_path), str(tmp_path / "log.csv"), str(tmp_path / "made" / "curves.png")))
    assert (tmp_path / "log.csv").read_text() == (
        "stage,step,loss,named,empty,emoji-place\nnames,9,4,0.1,,\nnames,19,2.5,0.5,,\nnames,29,1.5,0.1235,,\nlora,49,0.7,,,0.5\n"
    )
    with Image.open(tmp_path / "made" / "curves.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert (0, 114, 178) in colours, "the first stage's curve is drawn"


def test_a_folder_without_logs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no logs of names, connector, lora"):
        rows_of(tmp_path)

"""Capsules of a suite that are missing, and what is trained for it."""

import sys

import torch
from support.suite_files import CAPSULE, refused_line, rows_of

from kvcapsule.eval.main import main


def test_missing_capsules_are_refused_with_the_commands(vlm, tmp_path, suite_file, put_capsule, capsys) -> None:
    folder = put_capsule("there", 0.5)
    entries = [
        CAPSULE,
        {"name": "there", "train": ["kvcapsule"]},
        {"name": "fifth", "train": ["kvcapsule", "--compression", "5"]},
    ]
    arguments = ["--model", vlm, "--suite", suite_file(entries), "--suite-capsules", str(folder), "--train", "false"]
    refused = refused_line(capsys, *arguments)
    assert "2 of the suite's capsules are missing" in refused
    expected = [
        f"kvcapsule train kvcapsule --compression {compression} --model {vlm} --output {folder / name}"
        for name, compression in (("half", 2), ("fifth", 5))
    ]
    assert refused.endswith(f"Run: {' && '.join(expected)}")


def test_missing_capsules_are_trained(vlm, tmp_path, suite_file, capsys) -> None:
    """By the real command, once; the second run finds them."""
    sizes = [
        "--data.size",
        12,
        "--held_out",
        4,
        "--batch",
        4,
        "--moment_batches",
        2,
        "--optim.soft_steps",
        0,
        "--optim.hard_steps",
        1,
    ]
    path = suite_file([{"name": "tenth", "train": ["kvcapsule", "--compression", 10, *sizes]}], dtype="float32")
    arguments = [
        "--suite",
        path,
        "--suite-capsules",
        str(tmp_path / "capsules"),
        "--threads",
        str(torch.get_num_threads()),
    ]
    rows = rows_of(vlm, tmp_path, *arguments)
    shown = capsys.readouterr().err
    assert "kvcapsule train kvcapsule --compression 10 --data.size 12" in shown and f"--model {vlm} --output" in shown
    assert "training tenth" in shown
    assert rows["tenth"]["family"] == "kvcapsule" and 9 < rows["tenth"]["compression"] < 11
    assert rows_of(vlm, tmp_path, *arguments, "--train", "false")["tenth"] == rows["tenth"]
    assert "kvcapsule train" not in capsys.readouterr().err


def test_a_training_that_fails(vlm, tmp_path, suite_file, fake_training, capsys) -> None:
    path = suite_file([{"name": "bad", "train": ["nonsense"]}])
    assert main(["--model", vlm, "--suite", path, "--suite-capsules", str(tmp_path / "capsules")]) == 2
    *before, last = capsys.readouterr().err.strip().splitlines()
    assert last == "kvcapsule eval: the training of bad failed (exit code 2): kvcapsule train: no recipe 'nonsense'"
    assert "a warning" in before


def test_the_training_is_told_what_the_run_is_told(vlm, tmp_path, suite_file, fake_training) -> None:
    entries = [CAPSULE, {"capsule": "half", "latent_bits": 4}, {"method": "int4"}]
    folder = tmp_path / "capsules"
    arguments = ["--suite", suite_file(entries), "--suite-capsules", str(folder), "--device", "cpu"]
    rows_of(vlm, tmp_path, *arguments, "--methods", "int4")
    assert not fake_training
    rows_of(vlm, tmp_path, *arguments, "--methods", "half+int4")
    train = [
        "train",
        "kvcapsule",
        "--compression",
        "2",
        "--model",
        vlm,
        "--output",
        str(folder / "half"),
        "--device",
        "cpu",
        "--force",
    ]
    assert fake_training == [[sys.executable, "-m", "kvcapsule", *train]]


def test_a_capsule_that_was_trained_with_other_arguments(vlm, tmp_path, suite_file, fake_training, capsys) -> None:
    folder = tmp_path / "capsules"
    rows_of(vlm, tmp_path, "--suite", suite_file([CAPSULE]), "--suite-capsules", str(folder))
    path = suite_file([{**CAPSULE, "train": ["kvcapsule", "--compression", 2.5]}])
    refused = refused_line(capsys, "--model", vlm, "--suite", path, "--suite-capsules", str(folder))
    assert "--compression 2 " in refused and "--compression 2.5" in refused and "delete the folder" in refused
    # Records of before 0.1.0 have the old names.
    record = folder / "half.train"
    record.write_text(record.read_text().replace("--compression 2", "--ratio 0.5"))
    rows_of(vlm, tmp_path, "--suite", suite_file([CAPSULE]), "--suite-capsules", str(folder))
    # Where it was not this command that trained it, nobody can tell.
    (folder / "half.train").unlink()
    rows_of(vlm, tmp_path, "--suite", path, "--suite-capsules", str(folder))
    assert len(fake_training) == 1


def test_capsules_lie_in_a_folder_of_the_suites_name(vlm, suite_file, tmp_path, monkeypatch, fake_training) -> None:
    monkeypatch.chdir(tmp_path)
    rows_of(vlm, tmp_path, "--suite", suite_file([CAPSULE]))
    assert (tmp_path / "runs" / "mine" / "half" / "config.json").is_file()

"""`kvcapsule train` as a person types it: spelling, one-line errors, help with the defaults that run."""

from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import pytest

from kvcapsule.cli.estimate_training import HARVEST_BATCHES
from kvcapsule.cli.session import begin
from kvcapsule.errors import ConfigError, DataError
from kvcapsule.training.main import main
from kvcapsule.training.options import parse, shipped_recipes
from kvcapsule.training_footprint import TrainingSize

BOMB = "a: &a [1, 1]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 6)}]\n" for m, n in pairwise("abcdefghij"))


def read(*words: str):
    return parse(words, pytest.fail)


@pytest.mark.parametrize(
    "words", [["--held-out", "9", "--force"], ["--force", "--held_out=9"], ["--force", "true", "--held_out", "9"]]
)
def test_options_may_be_spelled_either_way(words: list[str]) -> None:
    recipe = read("transform", *words, "--resume", "--codec.canonical-frame", "false", "--transform.query-metric")
    assert (recipe.held_out, recipe.force, recipe.resume) == (9, True, True)
    assert (recipe.codec.canonical_frame, recipe.transform.query_metric) == (False, True)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--threads", "abc"], "--threads abc: a whole number or null is expected."),
        (["--batch=1.5"], "--batch 1.5: a whole number is expected."),
        (["--held_out", "many"], "--held-out many: a whole number or null is expected."),
        (["--compression", "much"], "--compression much: a number is expected."),
        (["--force", "maybe"], "--force maybe: true or false is expected."),
        (["--data.source"], "--data.source needs a value."),
        (["--data", ""], "--data '': a YAML file of the options --data.* is expected; or give these one by one."),
        (["--data", "{source: 3}"], "--data.source 3: text is expected."),
        (["--data.source", ""], "--data.source is empty: name a source of questions."),
        (["--nope", "1"], "there is no option --nope 1: --help shows the options."),
        (["--hled-out", "1"], "there is no option --hled-out 1; did you mean --held-out?"),
        (["--codec.tile", "-49"], "--codec.tile -49: it is a number of visual tokens; 0 takes the whole image."),
        (["--workers", "-1"], "--workers -1: it is a number of processes, 0 or more."),
        (["--trainer.devices", "0"], "--trainer.devices 0: at least 1 is needed."),
        (["--output", ""], "--output '' names no folder of its own: give one, such as runs/capsule."),
    ],
)
def test_errors_are_one_line_that_names_the_option(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"kvcapsule train: {line}\n"


@pytest.mark.parametrize(
    ("questions", "trained"), [(2, 1), (4, 3), (5, 4), (72, 58), (319, 256), (320, 256), (2048, 1984)]
)
def test_few_questions_are_shared_out_without_an_option(questions: int, trained: int) -> None:
    assert read().trained_of(questions) == trained


def test_what_estimate_counts_with_are_the_defaults() -> None:
    fisher = next(field.default for field in fields(TrainingSize) if field.name == "fisher_batches")
    assert (read().moment_batches, read().transform.fisher_batches) == (HARVEST_BATCHES, fisher)


@pytest.mark.parametrize(
    ("words", "questions", "says"),
    [([], 1, "1 question cannot spare 1 .* give more data"), (["--held-out", "9"], 9, "lower --held_out to at most 8")],
)
def test_too_few_questions(words: list[str], questions: int, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(*words).trained_of(questions)


@pytest.mark.parametrize("threads", [0, -1, 100_000])
def test_threads_that_no_machine_has(threads: int) -> None:
    """PyTorch dies with a hundred thousand, without a word."""
    from rich.console import Console

    with pytest.raises(ConfigError, match=rf"--threads {threads}: give 1 to \d+"):
        begin(Console(quiet=True), threads=threads, seed=0, device=None)


@pytest.mark.parametrize("option", ["model", "compression", "codec.tile", "data.source"])
def test_null_where_a_value_is_needed(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group, _, name = option.rpartition(".")
    (tmp_path / "r.yaml").write_text(f"{group}: {{{name}: null}}" if group else f"{name}: null")
    assert main([str(tmp_path / "r.yaml")]) == 2
    assert capsys.readouterr().err == f"kvcapsule train: --{option} null: a value is expected.\n"
    (tmp_path / "r.yaml").write_text(f"compression: {10**400}")
    assert main([str(tmp_path / "r.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "too large" in line


def test_a_recipe_of_too_many_values_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten nested aliases stand for twenty million values."""
    path = tmp_path / "r.yaml"
    path.write_text(BOMB)
    for words in ([str(path)], ["--recipe", str(path)], ["--data", str(path)], ["--data", BOMB]):
        assert main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "its aliases stand for more than 100,000 values" in line
    path.write_text("family: [\n")
    assert main([str(path)]) == 2
    assert f"the recipe {path} cannot be read" in capsys.readouterr().err


def helped(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_help_shows_the_defaults_that_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = helped(capsys)
    # The recipe's, where the class says 2.5 and 2,048.
    default = read()
    assert (default.family, default.compression, default.data.size) == ("cross-layer", 20, 4096)
    assert "at least 1. (type: float, default: 20" in text
    assert "Most questions to use. (type: int, default: 4096)" in text
    assert "(type: str, default: cross-layer)" in text
    for family in ("kvcapsule", "transform", "cross-layer", "compact"):
        # Lines break at hyphens.
        assert f"Options of the family {family}. Defaults are those of the recipe {family}." in text.replace("- ", "-")
    assert "--optim.hard-steps" in text and "default: 260" in text
    assert "--held-out HELD_OUT" in text and "--held_out" not in text
    own = helped(capsys, "compact")
    assert "at least 1. (type: float, default: 5" in own and "--compact.bank" in own and "--transform" not in own


@pytest.mark.parametrize("name", shipped_recipes())
def test_help_of_every_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"default: {read(name).model})" in helped(capsys, name)

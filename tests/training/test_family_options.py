"""The command line of training: each family has its options, those of others are refused by name, saved recipes
parse."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvcapsule.codec import FAMILIES
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.training.families import fit_class, recipe_class, trainable
from kvcapsule.training.options import parse
from kvcapsule.training.recipe import Recipe, flat, group_names, option_names
from kvcapsule.training.saved_recipe import upgraded

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "checkpoints").glob("*/recipe.yaml"))
EARLIER = [path for path in SHIPPED if "ratio" in yaml.safe_load(path.read_text())]
"""Saved before 0.1.0."""


def read(*words: str) -> Recipe:
    """The recipe of words that the user is told nothing about."""
    return parse(words, pytest.fail)


@pytest.mark.parametrize(
    ("family", "word", "owners"),
    [
        ("cross-layer", "--compact.bank=3", "the family compact"),
        ("cross-layer", "--codec.pyramid=0.2", "the families kvcapsule and transform and compact"),
        ("cross-layer", "--optim.lr=1", "the family kvcapsule"),
        ("transform", "--transform.joint_layers=2", "the family cross-layer"),
        ("transform", "--codec.key_share=0.3", "the family kvcapsule"),
        ("kvcapsule", "--transform.steps=4", "the families transform and cross-layer"),
        ("kvcapsule", "--bits=1", "the families transform and cross-layer"),
        ("compact", "--codec.layer_weights=[1]", "the family kvcapsule"),
        ("compact", "--transform=x.yaml", "the families transform and cross-layer"),
    ],
)
def test_an_option_of_another_family_is_refused_by_name(family: str, word: str, owners: str) -> None:
    option = word.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{option} is an option of {owners}, not of {family}"):
        read(family, word)


def test_the_family_decides_which_options_there_are() -> None:
    """By --family, by the last file, by the recipe, or by default."""
    assert (read().family, read("compact").family, read("--family", "kvcapsule").family) == (
        "cross-layer",
        "compact",
        "kvcapsule",
    )
    assert type(read("--family=compact", "--compact.bank", "7")) is recipe_class("compact")
    with pytest.raises(ConfigError, match=r"transform.* is an option of the families"):
        read("cross-layer", "--family", "compact")
    with pytest.raises(ConfigError, match="'identity' has nothing to train: choose one of kvcapsule, transform"):
        read("--family", "identity")
    with pytest.raises(ConfigError, match=r"--no\.option"):
        read("transform", "--no.option", "1")
    with pytest.raises(InputError, match="no recipe 'clever'"):
        read("clever")


def test_options_override_files_and_later_files_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("family: compact\nbatch: 3\ncompact: {bank: 5, passes: 1}\n")
    (tmp_path / "b.yaml").write_text("batch: 4\ncompact: {bank: 6}\n")
    recipe: Any = read(str(tmp_path / "a.yaml"), "--recipe", str(tmp_path / "b.yaml"), "--compact.bank", "8")
    assert (recipe.batch, recipe.compact.bank, recipe.compact.passes) == (4, 8, 1)


def test_a_hand_written_file_with_options_of_another_family_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("family: compact\noptim: {lr: 0.1}\n")
    with pytest.raises(ConfigError, match=r"r\.yaml: --optim\.lr is an option of the family kvcapsule, not of compact"):
        read(str(path))
    path.write_text("- 1\n")
    with pytest.raises(InputError, match="holds a list, not options"):
        read(str(path))


@pytest.mark.parametrize("path", EARLIER, ids=lambda path: path.parent.name)
def test_recipes_of_shipped_capsules_still_parse(path: Path) -> None:
    """They hold the options of all families, as runs of earlier versions saved them."""
    lines: list[str] = []
    recipe: Any = parse([str(path)], lines.append)
    saved = yaml.safe_load(path.read_text())
    assert recipe.family == saved["family"] and type(recipe) is recipe_class(saved["family"])
    assert recipe.compression == (saved["ratio"] if saved["ratio"] > 1 else pytest.approx(1 / saved["ratio"]))
    if recipe.family != "kvcapsule":
        assert recipe.transform.query_bank == saved["transform"]["readers"]
    (line,) = lines
    assert "left out" in line and "compact.bank" in line and f"not of the family {recipe.family}" in line
    groups = group_names(type(recipe))
    own = {n for n in option_names(type(recipe)) if n not in groups}
    left_out = line.partition("left out ")[2].partition(": not of")[0].split(", ")
    assert own.isdisjoint(left_out)
    assert {name for name, _ in flat(upgraded(saved), groups) if name not in own} <= {
        *left_out,
        *(n.partition(".")[0] for n in left_out),
    }


@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in EARLIER], ids=lambda path: path.parent.name)
def test_recipes_of_today_are_read_as_they_were_saved(path: Path) -> None:
    recipe = read(str(path))
    groups = group_names(type(recipe))
    assert dict(flat(yaml.safe_load(path.read_text()), groups)).items() <= dict(flat(asdict(recipe), groups)).items()


def test_every_family_names_itself_and_resumes_with_known_options() -> None:
    for family in trainable():
        options = recipe_class(family)
        assert options().family == family
        assert set(option_names(options)) >= options.RESUMABLE
        assert FAMILIES[family].recipe is not None and fit_class(FAMILIES[family]).recipe_class is options

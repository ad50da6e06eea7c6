"""Commands whose options are a config class: spelling, lists, renamed options, and errors that users cause."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from jsonargparse import ArgumentError

from kvcapsule.cli.errors import dashed
from kvcapsule.cli.options import OptionParser, instance, normalized, option_parser
from kvcapsule.cli.results import STDOUT, json_file, require_writable, write_json
from kvcapsule.errors import ConfigError, InputError


@dataclass(frozen=True)
class Part:
    """A part."""

    max_size: int = 3
    """Largest size."""


@dataclass(frozen=True)
class Config:
    """A config."""

    dry_run: bool = False
    """Do nothing."""
    names: list[str] = field(default_factory=list)
    """Names, with commas."""
    files: list[str] = field(default_factory=list)
    """Files."""
    part: Part = field(default_factory=Part)
    """A part."""


def parser() -> OptionParser:
    renamed = {"size": "--size is --part.max-size now.", "part.most": "--part.most is --part.max-size now."}
    return option_parser(Config, "p", "p [options]", "It.", lists={"names": True, "files": False}, renamed=renamed)


def read(*words: str) -> Config:
    return instance(Config, parser(), parser().read(words))


@dataclass(frozen=True)
class Needs:
    """A config."""

    text: str = "a"
    """Text."""
    share: float = 0.5
    """A share."""
    place: str | None = None
    """May be left out."""
    part: Part = field(default_factory=Part)
    """A part."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text: null", "--text null: a value is expected."),
        ("part: {max_size: null}", "--part.max-size null: a value is expected."),
        (f"share: {10**400}", "a number that is too large"),
        (f"share: 0x{'f' * 5000}", "a number has more than 1,000 digits"),
        ("share: !!timestamp z", "a value cannot be read"),
        ("place: null", None),
    ],
)
def test_null_and_numbers_past_all_bounds(content: str, said: str | None, tmp_path: Path) -> None:
    """jsonargparse takes null for any option of a YAML file, and raises OverflowError."""
    (tmp_path / "o.yaml").write_text(content)
    parser = option_parser(Needs, "p", "p [options]", "It.")

    def parse() -> Needs:
        return instance(Needs, parser, parser.read(["--config", str(tmp_path / "o.yaml")]))

    if said is None:
        assert parse() == Needs()
        return
    with pytest.raises((ConfigError, InputError), match=said):
        parse()


@pytest.mark.parametrize("value", ["9" * 5000, "!!timestamp z", "2024-99-99", "0x" + "f" * 5000])
@pytest.mark.parametrize("option", ["--text", "--share", "--part", "--part.max_size"])
def test_values_that_yaml_makes_none_of(option: str, value: str) -> None:
    parser = option_parser(Needs, "p", "p [options]", "It.")
    try:
        assert parser.read([option, value]).text in ("a", value)
    except (ConfigError, ArgumentError) as error:
        assert str(error)


def test_dashes_and_underscores_are_the_same_option() -> None:
    wanted = Config(dry_run=True, part=Part(5))
    assert read("--dry-run", "true", "--part.max-size=5") == read("--dry_run=true", "--part.max_size", "5") == wanted


def test_only_names_of_options_are_spelled_anew() -> None:
    words = ["--a-b", "c-d_e", "--f-g=h-i_j", "k-l"]
    assert normalized(words) == ["--a_b", "c-d_e", "--f_g=h-i_j", "k-l"]
    assert dashed("--a_b.c_d of x_y in z__--e_f") == "--a-b.c-d of x_y in z__--e_f"


def test_values_of_a_list_come_from_all_of_its_options() -> None:
    config = read("--names", "a,b", "--files", "x,y", "--names=c", "--files", "z")
    assert (config.names, config.files) == (["a", "b", "c"], ["x,y", "z"])


def test_a_list_of_the_command_line_replaces_that_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text("names: [a]\npart: {max_size: 9}\n")
    config = read("--config", str(tmp_path / "o.yaml"), "--names", "b")
    assert (config.names, config.part.max_size) == (["b"], 9)


@pytest.mark.parametrize("words", [["--size", "3"], ["--size=3"], ["--part.most", "3"], ["--part.most=3"]])
def test_renamed_options_are_refused_with_the_new_name(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"is --part\.max-size now"):
        parser().read(words)


@pytest.mark.parametrize("text", ["size: 3", "part:\n  most: 3", "names: [a]\nsize: 4"])
def test_renamed_options_of_a_file_are_refused_with_the_new_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "o.yaml").write_text(text)
    with pytest.raises((ConfigError, ArgumentError), match=r"is --part\.max-size now"):
        parser().read(["--config", str(tmp_path / "o.yaml")])


@pytest.mark.parametrize("words", [["--dry-ru", "true"], ["--part.max", "3"], ["--unknown", "1"], ["--dry-run", "so"]])
def test_options_are_not_abbreviated_and_values_are_checked(words: list[str]) -> None:
    with pytest.raises(ArgumentError):
        parser().read(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--dry-rnu"], "there is no option --dry_rnu; did you mean --dry_run?"),
        (["--part.maxsize=3"], "did you mean --part.max_size?"),
        (["--xyz", "3"], "nrecognized arguments: --xyz 3"),
        (["3"], "nrecognized arguments: 3"),
    ],
)
def test_a_mistyped_option(words: list[str], said: str) -> None:
    with pytest.raises(ArgumentError) as error:
        read(*words)
    assert said in str(error.value)


def test_help_shows_dashes() -> None:
    text = parser().format_help()
    assert "--part.max-size MAX_SIZE" in text and "--dry-run" in text and "_run" not in text.replace("DRY_RUN", "")


def test_json_goes_to_a_file_or_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(None, {"a": 1})
    write_json(str(tmp_path / "new" / "a.json"), {"a": 1})
    assert not capsys.readouterr().out
    write_json(STDOUT, {"a": 1})
    assert capsys.readouterr().out == (tmp_path / "new" / "a.json").read_text() == '{\n  "a": 1\n}\n'
    assert (json_file(STDOUT), json_file(None), json_file("a.json")) == (None, None, "a.json")
    require_writable([STDOUT, None])
    with pytest.raises(InputError, match="is a folder"):
        require_writable([str(tmp_path)])

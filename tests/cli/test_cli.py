"""The `kvcapsule` command: its table, what it costs to ask it for help, and how it ends."""

import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

import kvcapsule
from kvcapsule.cli import COMMANDS, HELP, main
from kvcapsule.cli.errors import Parser

HEAVY = ("torch", "transformers", "lightning", "datasets", "matplotlib", "numpy")


def add_command(monkeypatch: pytest.MonkeyPatch, name: str, run: object) -> None:
    module = ModuleType("command_of_a_test")
    module.main = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(COMMANDS, name, f"{module.__name__}:main")


def test_commands() -> None:
    """The command line is public: a command is added or renamed on purpose."""
    names = "analyze train eval bench estimate generate list methods models push report serve show store"
    assert list(COMMANDS) == names.split()
    assert HELP.keys() == COMMANDS.keys()


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, text in HELP.items():
        assert any(re.fullmatch(rf"  {name} +{re.escape(text)}", line) for line in lines), name


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_are_quick(option: str) -> None:
    """What is installed runs: the CPU seconds of a whole process, which a busy machine hardly changes."""
    times = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "kvcapsule", option], check=True, capture_output=True, timeout=60)
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times) < 0.5


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_library(option: str) -> None:
    code = (
        f"import sys; from kvcapsule.cli import main; assert main([{option!r}]) == 0; print(*sys.modules,"
        " file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.split())
    assert "kvcapsule.cli" in loaded
    assert not loaded & set(HEAVY)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kvcapsule {kvcapsule.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_sub_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: kvcapsule {name} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("trian", "did you mean 'train'?"),
        ("evaluate", "did you mean 'eval'?"),
        ("genrate", "did you mean 'generate'?"),
        ("--verison", "did you mean '--version'?"),
        ("xyz", f"the commands are {', '.join(COMMANDS)}."),
    ],
)
def test_unknown_command(given: str, advice: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([given]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("kvcapsule: ") and repr(given) in line and line.endswith(advice)
    assert not out


def test_exit_code_of_the_process() -> None:
    done = subprocess.run([sys.executable, "-m", "kvcapsule", "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert not done.stdout and done.stderr.startswith("kvcapsule: ") and done.stderr.count("\n") == 1


def test_no_command_shows_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert not out and "generate" in err


def test_arguments_and_exit_code_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    add_command(monkeypatch, "other", run)
    assert main(["other", "--help", "train"]) == 7
    assert seen == [["--help", "train"]]


def test_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    add_command(monkeypatch, "other", lambda argv: len(argv))
    monkeypatch.setattr(sys, "argv", ["kvcapsule", "other", "a", "b"])
    assert main() == 2


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(argv: list[str]) -> int:
        raise KeyboardInterrupt

    add_command(monkeypatch, "other", run)
    assert main(["other"]) == 130
    assert capsys.readouterr().err == "kvcapsule other: interrupted.\n"


@pytest.mark.parametrize(
    "command", [["models", "--json", "-"], ["models"], ["methods", "--json", "-"], ["methods"]], ids=" ".join
)
def test_a_reader_that_goes_away(command: list[str]) -> None:
    """As `head` does: no traceback, nothing at all on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "kvcapsule", *command], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert done.returncode == 141
    assert done.stderr == ""


def test_parser_complains_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    parser = Parser("kvcapsule other", "Something else.")
    parser.add_argument("--number", type=int)
    for wrong in (["--number", "x"], ["--num", "1"]):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(wrong)
        assert ended.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("kvcapsule other: ") and wrong[0] in line and "--help" in line

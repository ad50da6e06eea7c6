"""The README's blocks run."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvcapsule import Capsule
from kvcapsule.capsule.card import model_card
from kvcapsule.checkpoints import shipped
from kvcapsule.cli import COMMANDS, main
from kvcapsule.testbeds.pages import page

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text()
HAND_WRITTEN = re.sub(r"<!-- table: .*?<!-- end of table -->", "", TEXT, flags=re.DOTALL)
"""The README without its generated table, whose command takes hours."""
STARTS = {
    "train": "kvcapsule.training.fit.train",
    "analyze": "kvcapsule.training.analysis.study.run",
    "eval": "kvcapsule.eval.run.run",
    "bench": "kvcapsule.eval.bench.run.run",
    "report": "kvcapsule.eval.capsule_page.content.gather",
    "serve": "kvcapsule.cli.serve.command_line",
}
"""Of commands that take minutes: the function that they start with what their command line says."""
RUN = ("models", "methods", "estimate", "generate", "list", "show", "store")
OF_THE_NETWORK = ("push",)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", HAND_WRITTEN, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [line[1:] for line in lines if line and line[0] == "kvcapsule"]


def test_the_first_block_answers_a_question_and_counts_bytes(tmp_path: Path) -> None:
    """Pasted into an interpreter of its own."""
    block = blocks("python")[0]
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *_, answer, line = done.stdout.splitlines()
    assert answer.split()[-1] in page("test", 0).text
    total, visual, full = (int(count.replace(",", "")) for count in re.findall(r"\d[\d,]*", line))
    assert 0 < visual < total / 2 and total < full / 2


def test_the_first_block_runs_for_another_model(
    vlm: str, make_capsule: Callable[[float], Capsule], tmp_path: Path, capsys
) -> None:
    """With two words changed."""
    block = blocks("python")[0]
    make_capsule(0.5).save_pretrained(tmp_path / "mine")
    for word, replacement in (('"pages-vlm"', vlm), ('"pages-vlm-cross-layer"', str(tmp_path / "mine"))):
        assert block.count(word) == 1
        block = block.replace(word, repr(replacement))
    exec(block, {})
    assert "full cache:" in capsys.readouterr().out


def test_the_block_with_auto_classes_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    """With a local folder in place of the Hub id, beside the capsule and the image that it names."""
    _, block = blocks("python")
    monkeypatch.chdir(tmp_path)
    page("test", 0).image.save("page.png")
    shutil.copytree(str(shipped("pages-vlm-cross-layer")), "runs/my-capsule")
    name = '"llava-hf/llava-1.5-7b-hf"'
    assert block.count(name) == 1
    exec(block.replace(name, repr(str(shipped("pages-vlm")))), {})
    assert capsys.readouterr().out.split()[-1] in page("test", 0).text


def test_a_cards_code_and_commands_run(tmp_path: Path, monkeypatch, capsys) -> None:
    """As they stand, beside an image of the name that they give."""
    monkeypatch.chdir(tmp_path)
    page("test", 0).image.save("image.png")
    capsule = Capsule.from_pretrained("pages-vlm-cross-layer")
    card = model_card(capsule.config, None, None, "pages-vlm-cross-layer")
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout, done.stderr
    printed = {words.split()[1]: shlex.split(words)[1:] for words in re.findall(r"`(kvcapsule [^`]+)`", card)}
    assert set(printed) == {"generate", "eval"}
    assert main(printed["generate"]) == 0 and capsys.readouterr().out
    quick = ["--data.size", "4", "--batch", "4", "--max-new-tokens", "4", "--timing", "false", "--methods", "int4"]
    assert main([*printed["eval"], *quick]) == 0


def test_every_command_is_shown() -> None:
    assert {command for command, *_ in commands()} == set(COMMANDS) == {*STARTS, *RUN, *OF_THE_NETWORK}


class Started(BaseException):
    """Raised in place of the work, past all that a command catches."""


def start(*args: object, **kwargs: object) -> None:
    raise Started


@pytest.mark.parametrize("words", [words for words in commands() if words[0] in STARTS], ids=" ".join)
def test_a_long_command_is_understood(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """Beside the capsule that the commands before it train."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(str(shipped("pages-vlm-cross-layer")), "runs/my-capsule")
    monkeypatch.setattr(STARTS[words[0]], start)
    with pytest.raises(Started):
        main(words)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] in RUN], ids=" ".join)
def test_a_short_command_runs(words: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    page("test", 0).image.save("page.png")
    shutil.copytree(str(shipped("pages-vlm-cross-layer")), "runs/my-capsule")
    Path("runs/images").mkdir(parents=True)
    assert main(words) == 0
    assert capsys.readouterr().out

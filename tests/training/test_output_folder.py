"""The folders of a run: one path for all, what may be replaced, one run at a time."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvcapsule.atomic_files import unique_name
from kvcapsule.errors import ConfigError, InputError
from kvcapsule.training.output_folder import OutputFolder, how_to_go_on, output_folder
from kvcapsule.training.recipe import Recipe
from kvcapsule.training.run_state import save_closed_form

CAPSULE = {"config.json": '{"format_version": 1, "family": "transform"}', "README.md": "mine"}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def run(recipe: Recipe, state: str | None = "closed-form.ckpt") -> OutputFolder:
    """Begin a run, leave a state, and do not come to its end."""
    with pytest.raises(KeyboardInterrupt), output_folder(recipe) as folder:
        folder.start()
        if state is not None:
            fill(recipe.work, {state: "state", "csv/metrics.csv": "1", "tensorboard/events.out.tfevents.1": "1"})
        raise KeyboardInterrupt
    return folder


def refuse(recipe: Recipe, match: str) -> None:
    """The run does not begin."""
    with pytest.raises(InputError, match=match), output_folder(recipe):
        pytest.fail("went on")


@pytest.mark.parametrize("given", ["runs/x/", "runs/x", "./runs//x/", "runs/y/../x"])
def test_logs_lie_beside_the_capsule_however_it_is_written(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(output=given)
    assert recipe.folder.resolve() == tmp_path / "runs" / "x"
    assert recipe.work.resolve() == tmp_path / "runs" / "x.run"


def test_home_is_expanded_before_anything_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "c", CAPSULE)
    recipe = Recipe(output="~/c")
    assert (recipe.folder, recipe.work) == (tmp_path / "c", tmp_path / "c.run")
    with (
        pytest.raises(InputError, match="c exists: choose another --output, or replace it with --force"),
        output_folder(recipe),
    ):
        pytest.fail("went on")
    assert os.listdir(tmp_path) == ["c"] and files(tmp_path / "c") == set(CAPSULE)


@pytest.mark.parametrize("given", ["", " ", "/", "~nobody-of-this-name/x"])
def test_an_output_that_names_no_folder(given: str) -> None:
    with pytest.raises(ConfigError, match="--output"):
        Recipe(output=given)


def test_what_no_run_wrote_is_never_removed(tmp_path: Path) -> None:
    """Not even with --force."""
    fill(tmp_path / "c.run", {"thesis.tex": "years", "csv/metrics.csv": "mine"})
    for force in (False, True):
        with (
            pytest.raises(InputError, match=r"no run wrote it \(it holds csv, thesis.tex\)"),
            output_folder(Recipe(output=str(tmp_path / "c"), force=force)),
        ):
            pytest.fail("went on")
    assert files(tmp_path / "c.run") == {"thesis.tex", "csv/metrics.csv"}


def test_a_former_run_is_replaced_when_that_is_asked_for(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "c"))
    run(recipe)
    fill(recipe.work, {"notes.txt": "mine"})
    before = files(recipe.work)
    with (
        pytest.raises(
            InputError, match="of a former run: continue that run with --resume, or replace them with --force"
        ),
        output_folder(recipe),
    ):
        pytest.fail("went on")
    assert files(recipe.work) == before
    with output_folder(Recipe(output=recipe.output, force=True)) as folder:
        assert files(recipe.work) == before, "kept until the new run begins"
        folder.start()
        assert files(recipe.work) == {"notes.txt", "lock", "run.json"}
        folder.finish()
    refuse(recipe, "of a former run: replace them with --force")


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "deep" / "c"))
    run(recipe, state=None)
    with pytest.raises(ConfigError), output_folder(recipe):
        raise ConfigError("known only after the model is loaded")
    assert not recipe.work.exists()
    assert "nothing is kept" in how_to_go_on(recipe, "kvcapsule train")


def test_a_resumed_run_may_replace_what_its_first_half_might(tmp_path: Path) -> None:
    fill(tmp_path / "c", CAPSULE)
    run(Recipe(output=str(tmp_path / "c"), force=True))
    kept = tmp_path / "c.run" / "closed-form.ckpt"
    save_closed_form(tmp_path / "c.run", {}, {}, [])
    with output_folder(Recipe(output=str(tmp_path / "c"), resume=True)) as folder:
        assert folder.replaces
        folder.start()
        assert kept.is_file()
        folder.require_unchanged()
        folder.finish()
    with (
        pytest.raises(InputError, match="is finished"),
        output_folder(Recipe(output=str(tmp_path / "c"), resume=True, force=True)),
    ):
        pytest.fail("went on")


def test_nothing_to_resume(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "c"), resume=True)
    refuse(recipe, "nothing to resume: there is no")
    # As a run that was killed in its closed form leaves it.
    fill(recipe.work, {"run.json": json.dumps({"state": "running"})})
    refuse(recipe, "came to the end of its closed form")


def test_what_a_killed_run_had_not_yet_renamed_is_in_nobodys_way(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "c"))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "getpid", lambda: ended.pid)
        names = [f"{unique_name(recipe.work / name)}.partial" for name in ("run.json", "last.ckpt")]
    fill(recipe.work, dict.fromkeys(names, "half"))
    with output_folder(recipe) as folder:
        folder.start()
        assert files(recipe.work) == {"lock", "run.json"}


HOLDER = """
import sys, time
from kvcapsule.training.output_folder import output_folder
from kvcapsule.training.recipe import Recipe
with output_folder(Recipe(output=sys.argv[1])) as folder:
    folder.start()
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused_while_the_first_one_lives(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "c"))
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, recipe.output], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "ready\n"
    for more in ({}, {"force": True}, {"resume": True}):
        with (
            pytest.raises(InputError, match=rf"another run \(process {first.pid} on .*\) writes to .*c: wait"),
            output_folder(Recipe(output=recipe.output, **more)),
        ):
            pytest.fail("went on")
    first.kill()
    first.communicate()
    # Its lock file is still there, and holds nobody up.
    assert files(recipe.work) == {"lock", "run.json"}
    with output_folder(Recipe(output=recipe.output, force=True)) as folder:
        folder.start()


def test_what_came_to_the_output_meanwhile_is_left(tmp_path: Path) -> None:
    recipe = Recipe(output=str(tmp_path / "c"))
    with (
        pytest.raises(InputError, match=r"was written while this run trained.*--resume --force"),
        output_folder(recipe) as folder,
    ):
        folder.start()
        fill(recipe.work, {"closed-form.ckpt": "state"})
        fill(recipe.folder, CAPSULE)
        folder.require_unchanged()
    assert (recipe.folder / "README.md").read_text() == "mine" and (recipe.work / "closed-form.ckpt").is_file()
    # Another run that removed the folder, lock and all, and began its own.
    with (
        pytest.raises(InputError, match="was replaced while this run trained"),
        output_folder(Recipe(output=recipe.output, force=True)) as folder,
    ):
        folder.start()
        fill(recipe.work, {"run.json": json.dumps({"id": "other"}), "last.ckpt": "state"})
        folder.require_unchanged()
    assert json.loads((recipe.work / "run.json").read_text()) == {"id": "other"}


def test_places_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match=r"c\.run cannot be written to: .*Choose another --output"),
        output_folder(Recipe(output=str(tmp_path / "file" / "c"))),
    ):
        pytest.fail("went on")
    recipe = Recipe(output=str(tmp_path / "c"))
    with (
        pytest.raises(InputError, match=r"c\.run cannot be written to: the disk is full\."),
        output_folder(recipe) as folder,
    ):
        folder.start()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not recipe.work.exists()
    # What is not about these folders stays what it is.
    with pytest.raises(FileNotFoundError), output_folder(recipe):
        raise FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "elsewhere"))

"""The Hub: capsules are pushed and come back, in a process of its own; hub_server.py is the Hub."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.capsule_files import FILES, METRICS, RECIPE, configure, fixed_capsule
from support.hub_server import TOKEN, HubServer

from kvcapsule import CapsuleError
from kvcapsule.capsule.card import renamed
from kvcapsule.capsule.hub import Destination
from kvcapsule.capsule.push import push_directory
from kvcapsule.cli import push as push_command

CLIENT = """
import contextlib, io, json, sys
from kvcapsule import Capsule, CapsuleError
from kvcapsule.capsule import hub
from kvcapsule.capsule.push import push_directory
from kvcapsule.cli.push import main

def push(folder, *args, **kwargs):
    return push_directory(folder, hub.Destination(*args, **kwargs))

RESULTS = {}

def attempt(name, function, *args, **kwargs):
    try:
        value = function(*args, **kwargs)
    except CapsuleError as error:
        value = {"error": str(error)}
    if isinstance(value, Capsule):
        value = value.state_dict()["layers.0.keys.theta"].flatten().tolist()
    RESULTS[name] = value if isinstance(value, (str, int, list, dict)) else repr(value)

def command(*args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(args))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
"""
ONLINE = """
first, second = sys.argv[1:]
attempt("missing", Capsule.from_pretrained, "org/absent")
attempt("missing config", hub.read_config, "org/absent")
attempt("pushed", push, first, "org/tiny")
attempt("pushed again", push, first, "org/tiny")
metrics = {"train": {"loss": 2.0}}
attempt("pushed branch", Capsule.from_pretrained(second).push_to_hub, "org/tiny", revision="v2", metrics=metrics)
attempt("loaded", Capsule.from_pretrained, "org/tiny")
attempt("loaded branch", Capsule.from_pretrained, "org/tiny", revision="v2")
attempt("missing revision", Capsule.from_pretrained, "org/tiny", revision="v3")
attempt("missing revision config", hub.read_config, "org/tiny", revision="v3")
attempt("private", push, first, "org/secret", private=True)
attempt("already public", push, second, "org/tiny", private=True)
attempt("config only", hub.read_config, "org/secret")
attempt("model", Capsule.from_pretrained, "org/model")
attempt("not a capsule", Capsule.from_pretrained, "org/plain")
attempt("not a capsule config", hub.read_config, "org/plain")
attempt("wrong token", push, first, "org/other", token="hf_wrong")
attempt("wrong name", push, first, "tiny")
attempt("wrong directory", push, "org/absent", "org/other")
attempt("command", command, first, "org/command", "--private", "--revision", "v1")
attempt("failed command", command, first + "-absent", "org/command")
"""
AWAY = """
for mode in ("unreachable", "offline"):
    # What the variable HF_HUB_OFFLINE sets when the client is imported.
    hub.constants.HF_HUB_OFFLINE = mode == "offline"
    attempt(f"{mode}: loaded", Capsule.from_pretrained, "org/tiny")
    attempt(f"{mode}: loaded branch", Capsule.from_pretrained, "org/tiny", revision="v2")
    attempt(f"{mode}: config only", hub.read_config, "org/secret")
    attempt(f"{mode}: config only, load", Capsule.from_pretrained, "org/secret")
    attempt(f"{mode}: missing", Capsule.from_pretrained, "org/absent")
    attempt(f"{mode}: push", push, sys.argv[1], "org/tiny")
# Only offline: where nothing answers, the client asks for a single file again and again, for 25 seconds.
attempt("missing config", hub.read_config, "org/absent", revision="v2")
"""

DAMAGED = """
import pathlib
home = pathlib.Path(hub.constants.HF_HUB_CACHE)

def blobs(name):
    return [link.resolve() for link in home.rglob(name)]

def damage(cut, *names):
    for blob in {blob for name in names for blob in blobs(name)}:
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content[:20] if cut else content)

attempt("sound", Capsule.from_pretrained, "org/tiny")
damage(True, "config.json", "model.safetensors")
attempt("cut", Capsule.from_pretrained, "org/tiny")
# A number has changed, and the file is a sound one.
damage(False, "model.safetensors")
attempt("other number", Capsule.from_pretrained, "org/tiny")
damage(True, "config.json")
attempt("config", hub.read_config, "org/tiny")
damage(False, "model.safetensors")
hub.constants.HF_HUB_OFFLINE = True
attempt("offline", Capsule.from_pretrained, "org/tiny")
hub.constants.HF_HUB_OFFLINE = False
attempt("mended", Capsule.from_pretrained, "org/tiny", force_download=True)
attempt("sound again", Capsule.from_pretrained, "org/tiny")
attempt("folder", Capsule.from_pretrained, sys.argv[1], force_download=True)
"""


def run_client(script: str, arguments: list[str], home: Path, endpoint: str) -> dict[str, Any]:
    """What the script's attempts gave. A process of its own, since huggingface_hub reads its settings when it is
    imported."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower() and k != "TRANSFORMERS_OFFLINE"
    }
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-c", f"{CLIENT}{script}\nprint(json.dumps(RESULTS))", *arguments]
    done = subprocess.run(command, env={**clean, **settings}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert isinstance(results, dict)
    return results


class Visit:
    """One client process that did everything with one server, and what both saw."""

    def __init__(self, folder: Path, server: HubServer) -> None:
        self.server, self.home, self.first, self.second = server, folder / "home", folder / "first", folder / "second"
        fixed_capsule().save_pretrained(self.first, recipe=RECIPE, metrics=METRICS)
        fixed_capsule(salt=1).save_pretrained(self.second)
        server.add("org/plain", {"README.md": b"nothing"})
        server.add(
            "org/model", {"config.json": b'{"model_type": "llava"}', "model.safetensors": b"", "extra.bin": b"x"}
        )
        self.results = run_client(ONLINE, [str(self.first), str(self.second)], self.home, server.url)

    def error(self, name: str) -> str:
        return str(self.results[name]["error"])


@pytest.fixture(scope="module")
def visit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    with HubServer() as server:
        yield Visit(tmp_path_factory.mktemp("hub"), server)


def theta(salt: int) -> list[float]:
    values: list[float] = fixed_capsule(salt).state_dict()["layers.0.keys.theta"].flatten().tolist()
    return values


def test_pushed_capsules_come_back(visit: Visit) -> None:
    assert visit.results["pushed"] == visit.results["pushed again"] == f"{visit.server.url}/org/tiny"
    assert visit.results["pushed branch"] == f"{visit.server.url}/org/tiny/tree/v2"
    assert visit.results["loaded"] == theta(0)
    assert visit.results["loaded branch"] == theta(1) != theta(0)


def test_what_is_pushed_is_the_directory(visit: Visit) -> None:
    files = visit.server.files("org/tiny")
    assert set(files) == FILES | {".gitattributes"}
    for name in FILES - {"README.md"}:
        assert files[name].content == (visit.first / name).read_bytes()
    assert files["model.safetensors"].lfs and not files["config.json"].lfs
    local = (visit.first / "README.md").read_text()
    assert files["README.md"].content.decode() == renamed(local, "org/tiny") != local
    branch = visit.server.files("org/tiny", "v2")
    assert json.loads(branch["metrics.json"].content) == {"train": {"loss": 2.0}}
    # The second push of the same files made no commit: the two branches' beginnings and one commit on each are all.
    assert len(visit.server.repositories["org/tiny"].commits) == 3


def test_config_alone_is_downloaded_alone(visit: Visit) -> None:
    assert visit.results["config only"] == repr(configure())
    got = [request for request in visit.server.requests if request.startswith("GET /org/secret/resolve")]
    assert [request.rpartition("/")[2] for request in got] == ["config.json"]


def test_a_snapshot_is_the_capsule_and_no_more(visit: Visit) -> None:
    assert visit.error("model") == visit.error("model").strip() and "the model_type 'llava' of a model" in visit.error(
        "model"
    )
    assert not [request for request in visit.server.requests if request.endswith("extra.bin")]


def test_private_stays_private(visit: Visit) -> None:
    assert visit.results["private"] == f"{visit.server.url}/org/secret"
    assert visit.server.repositories["org/secret"].private and not visit.server.repositories["org/tiny"].private
    assert "nothing was pushed: org/tiny exists already and is public" in visit.error("already public")
    assert (
        visit.server.files("org/tiny")["model.safetensors"].content == (visit.first / "model.safetensors").read_bytes()
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("missing", ["no capsule 'org/absent'", "no such directory", "no such repository on the Hub"]),
        ("missing config", ["no capsule 'org/absent'", "no such directory", "no such repository on the Hub"]),
        ("missing revision", ["the repository org/tiny on the Hub has no revision 'v3'"]),
        ("missing revision config", ["the repository org/tiny on the Hub has no revision 'v3'"]),
        ("not a capsule", ["org/plain", "not a capsule", "config.json, model.safetensors missing"]),
        ("not a capsule config", ["org/plain", "not a capsule", "config.json"]),
        ("wrong token", ["cannot push to org/other", "does not let you write there (HTTP 401)", "hf auth login"]),
        ("wrong name", ["'tiny' is no name of a repository", "organisation/name"]),
        ("wrong directory", ["there is no directory 'org/absent' to push"]),
    ],
)
def test_errors_of_the_hub(visit: Visit, name: str, expected: list[str]) -> None:
    message = visit.error(name)
    assert not [part for part in expected if part not in message], message
    assert "\n" not in message


def test_push_command(visit: Visit) -> None:
    assert visit.results["command"] == {"code": 0, "out": f"{visit.server.url}/org/command/tree/v1\n", "err": ""}
    assert visit.server.repositories["org/command"].private
    assert set(visit.server.files("org/command", "v1")) == FILES | {".gitattributes"}
    assert set(visit.server.files("org/command")) == {".gitattributes"}
    failed = visit.results["failed command"]
    assert failed["code"] == 2 and failed["out"] == ""
    assert failed["err"].startswith("kvcapsule push: no capsule ") and failed["err"].count("\n") == 1


def test_damaged_capsules_are_not_pushed(saved: Path) -> None:
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(CapsuleError, match="cannot be read"):
        push_directory(saved, Destination("org/tiny"))
    (saved / "recipe.yaml").unlink()
    with pytest.raises(CapsuleError, match=r"lacks recipe\.yaml"):
        push_directory(saved, Destination("org/tiny"))


def test_push_command_reads_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["a"], ["a", "b", "--public"]):
        with pytest.raises(SystemExit, match="2"):
            push_command.main(arguments)
        error = capsys.readouterr().err
        assert error.startswith("kvcapsule push: ") and error.count("\n") == 1


def test_without_the_hub(visit: Visit, tmp_path: Path) -> None:
    """What is in the cache loads; what is not says why, where nothing answers and in offline mode."""
    shutil.copytree(visit.home, tmp_path / "home", symlinks=True)
    with HubServer() as gone:
        nowhere = gone.url
    results = run_client(AWAY, [str(visit.first)], tmp_path / "home", nowhere)
    for mode, reason in (
        ("unreachable", f"the Hub ({nowhere}) gave no usable answer"),
        ("offline", "offline mode is on"),
    ):
        assert results[f"{mode}: loaded"] == theta(0) and results[f"{mode}: loaded branch"] == theta(1)
        assert results[f"{mode}: config only"] == repr(configure())
        assert "model.safetensors" in results[f"{mode}: config only, load"]["error"]
        missing = results[f"{mode}: missing"]["error"]
        assert (
            "no capsule 'org/absent': there is no such directory here, it is not wholly in this machine's cache"
            in missing
        )
        assert reason in missing
        assert "cannot push to org/tiny" in results[f"{mode}: push"]["error"]
    assert "no capsule 'org/absent' at revision 'v2': " in results["missing config"]["error"]


def test_what_is_damaged_in_the_cache_is_downloaded_again(tmp_path: Path) -> None:
    """Once, and alone; and all of it if that is wanted."""
    fixed_capsule().save_pretrained(tmp_path / "tiny", recipe=RECIPE, metrics=METRICS)
    with HubServer() as server:
        files = {name: (tmp_path / "tiny" / name).read_bytes() for name in FILES}
        server.add("org/tiny", files)
        results = run_client(DAMAGED, [str(tmp_path / "tiny")], tmp_path / "home", server.url)
        got = [request.rpartition("/")[2] for request in server.requests if request.startswith("GET /org/tiny/resolve")]
    for name in ("sound", "cut", "other number", "mended", "sound again"):
        assert results[name] == theta(0), name
    assert results["config"] == repr(configure())
    assert "model.safetensors of org/tiny is damaged" in results["offline"]["error"]
    assert "HF_HUB_OFFLINE" in results["offline"]["error"]
    assert "is a directory" in results["folder"]["error"]
    # First, cut, another number, all anew; config.json beside that for its own damage.
    assert got.count("model.safetensors") == 4 and got.count("config.json") == 4 and got.count("README.md") == 2

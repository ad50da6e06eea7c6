"""Packages are fetched by name, version and hash; what goes wrong is said once, with the way out."""

import hashlib
import subprocess
import zipfile

import pytest

from kvcapsule.data.source import SourceConfig, load
from kvcapsule.errors import DataError, PackageError
from kvcapsule.testbeds import packages
from kvcapsule.testbeds.emoji import _member
from kvcapsule.testbeds.packages import Package


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> tuple[Package, bytes]:
    """A package, and the file that a registry would give; packages are kept in tmp_path / "kept"."""
    monkeypatch.setenv("KVCAPSULE_PACKAGES", str(tmp_path / "kept"))
    made = tmp_path / "made.whl"
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("some_data/words.txt", "hello")
    content = made.read_bytes()
    return Package("some-data", "1.0", "some_data-1.0.whl", hashlib.sha256(content).hexdigest(), "MIT"), content


def _registry(monkeypatch, name: str, content: bytes, code: int = 0, said: str = "") -> list[list[str]]:
    """Let the registry's client write `content` into a file of that name; returns the commands that were run."""
    commands: list[list[str]] = []

    def run(command, cwd, **_):
        commands.append(command)
        if not code:
            (cwd / name).write_bytes(content)
        return subprocess.CompletedProcess(command, code, "", said)

    monkeypatch.setattr(packages.subprocess, "run", run)
    return commands


def test_a_package_is_fetched_once_and_kept(wheel, monkeypatch) -> None:
    package, content = wheel
    commands = _registry(monkeypatch, package.file, content)
    assert package.path().read_bytes() == content and package.path().parent == packages.folder()
    assert (package.extracted() / "some_data" / "words.txt").read_text() == "hello" and package.extracted().is_dir()
    (command,) = commands
    assert "some-data==1.0" in command and "--no-deps" in command
    assert [p.name for p in packages.folder().iterdir() if p.is_file()] == [package.file]


def test_another_file_than_the_pinned_one_is_refused(wheel, monkeypatch) -> None:
    package, content = wheel
    _registry(monkeypatch, package.file, content + b"more")
    with pytest.raises(PackageError, match=f"expected {package.sha256}"):
        package.path()
    assert not (packages.folder() / package.file).exists()
    _registry(monkeypatch, "some_data-1.1.whl", content)
    with pytest.raises(PackageError, match=r"expected the file some_data-1.0.whl, got some_data-1.1.whl"):
        package.path()
    (packages.folder() / package.file).write_bytes(b"changed on the disk")
    with pytest.raises(PackageError, match="Delete it"):
        package.path()


def test_a_failed_download_says_why_and_where_to_put_the_file(wheel, monkeypatch) -> None:
    package, _ = wheel
    _registry(monkeypatch, "", b"", 1, "WARNING: slow\nERROR: no connection")
    with pytest.raises(
        PackageError, match=r"some-data 1.0: ERROR: no connection .*put some_data-1.0.whl .*sha256"
    ) as error:
        package.path()
    assert str(packages.folder()) in str(error.value) and "WARNING" not in str(error.value)
    monkeypatch.setattr(packages.shutil, "which", lambda _: None)
    with pytest.raises(PackageError, match="apt-get, which is not on this machine"):
        Package("some-font", "1", "some.deb", "0", "OFL-1.1", debian=True).path()
    with pytest.raises(DataError, match="easy-vqa cannot be fetched"):
        load(SourceConfig("easy-vqa", "test", 1))


def test_pins_are_whole() -> None:
    pins = [value for value in vars(packages).values() if isinstance(value, Package)]
    assert len(pins) == 5
    for pin in pins:
        assert len(pin.sha256) == 64 and int(pin.sha256, 16) and pin.version in pin.file and pin.licence
        assert pin.file.endswith(".deb" if pin.debian else ".whl")


def test_a_file_is_found_in_a_debian_package() -> None:
    def entry(name: str, content: bytes) -> bytes:
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        assert len(header) == 60
        return header + content + b"\n" * (len(content) % 2)

    archive = (
        b"!<arch>\n" + entry("debian-binary", b"2.0") + entry("control.tar.xz/", b"odd") + entry("data.tar.xz", b"font")
    )
    assert _member(archive, "data.tar.xz") == b"font" and _member(archive, "control.tar.xz") == b"odd"
    with pytest.raises(PackageError, match=r"holds no data.tar.gz"):
        _member(archive, "data.tar.gz")

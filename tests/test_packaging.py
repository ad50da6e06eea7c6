"""The wheel holds what it should and nothing else, imports run one way, and the lists that exist in two places
agree."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {package: ROOT / folder for package, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}
DATA_FOLDERS = {
    "kvcapsule/training/recipes": "*.yaml",
    "kvcapsule/eval/suites": "*.yaml",
    "kvcapsule/eval/capsule_page": "*.html",
    "kvcapsule/eval/lmms": "tasks/*",
    "kvcapsule/checkpoints": "*/**/*",
    "kvcapsule/kernels/cpu": "*",
}
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE")


def module_name(path: Path) -> str:
    """Name under which a source file is imported once installed."""
    package, root = max(
        ((p, r) for p, r in MAPPED.items() if path.is_relative_to(r)), key=lambda pair: len(pair[1].parts)
    )
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imported_names(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every absolute name that the source of `module` imports, in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                drop = node.level - 1 if is_package else node.level
                parents = module.split(".")
                base = ".".join([*parents[: len(parents) - drop], *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def reaches(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def sources() -> list[Path]:
    return sorted({path for root in MAPPED.values() for path in root.rglob("*.py")})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no earlier build's leftovers get in and none stay in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in BUILD_INPUTS:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    for root in MAPPED.values():
        shutil.copytree(root, tree / root.name)
    # What must stay out is there to be left out.
    for trap in ("eval/results/trap.json", "training/NOTES.md", "checkpoints/__pycache__/trap.cpython-311.pyc"):
        (tree / trap).parent.mkdir(exist_ok=True)
        (tree / trap).touch()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "--wheel-dir",
        out,
        tree,
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def test_wheel_adds_one_name_to_site_packages(names: set[str]) -> None:
    assert {name.split("/")[0] for name in names} == {
        "kvcapsule",
        f"kvcapsule-{PYPROJECT['project']['version']}.dist-info",
    }


def test_wheel_holds_every_module_once(names: set[str]) -> None:
    expected = set()
    for path in sources():
        stem = module_name(path).replace(".", "/")
        expected.add(f"{stem}/__init__.py" if path.name == "__init__.py" else f"{stem}.py")
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"kvcapsule/training/__init__.py", "kvcapsule/eval/__init__.py"} <= names


def test_wheel_holds_the_data_files(names: set[str]) -> None:
    expected = set()
    for target, pattern in DATA_FOLDERS.items():
        package = target.replace("/", ".")
        owner = max((p for p in MAPPED if reaches(package, p)), key=len)
        folder = MAPPED[owner].joinpath(*package.removeprefix(owner).split(".")[1:])
        files = (
            path
            for path in folder.glob(pattern)
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
        )
        expected |= {f"{target}/{path.relative_to(folder).as_posix()}" for path in files}
    assert {n for n in names if n.startswith("kvcapsule/") and not n.endswith(".py")} == expected | {
        "kvcapsule/py.typed"
    }


def test_wheel_metadata(wheel: Path, names: set[str]) -> None:
    info = f"kvcapsule-{PYPROJECT['project']['version']}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert "kvcapsule = kvcapsule.cli:main" in entry_points.splitlines()
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_imports_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import kvcapsule.training, kvcapsule.eval, kvcapsule.checkpoints; print(kvcapsule.training.__file__,"
        " kvcapsule.eval.__file__)"
    )
    env = {**os.environ, "PYTHONPATH": str(wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=env, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(file).is_relative_to(wheel) for file in done.stdout.split())


def test_packages_are_the_folders_with_an_init() -> None:
    found = {module_name(path) for path in sources() if path.name == "__init__.py"}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


@pytest.mark.parametrize(
    ("module", "is_package", "source", "expected"),
    [
        ("kvcapsule.a", False, "def f():\n    import kvcapsule.training", "kvcapsule.training"),
        ("kvcapsule.a", False, "from kvcapsule import training", "kvcapsule.training"),
        ("kvcapsule.a", False, "from .eval import quality", "kvcapsule.eval.quality"),
        ("kvcapsule.cli", True, "from ..training.fit import main", "kvcapsule.training.fit.main"),
        ("kvcapsule.cli.train", False, "from .. import training", "kvcapsule.training"),
        ("kvcapsule.eval.suites", True, "from ...training import losses", "kvcapsule.training.losses"),
    ],
)
def test_import_finder(module: str, is_package: bool, source: str, expected: str) -> None:
    assert expected in set(imported_names(source, module, is_package))


def test_imports_run_one_way() -> None:
    library = {"kvcapsule.training", "kvcapsule.eval"}
    wrong = []
    for path in sources():
        module = module_name(path)
        # training and eval each see the library and themselves; the library sees neither. Nobody may rely on the tree's
        # top level.
        forbidden = {p for p in library if not reaches(module, p)} | {"training", "eval", "checkpoints", "tests"}
        for name in imported_names(path.read_text(), module, path.name == "__init__.py"):
            if any(reaches(name, package) for package in forbidden):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_constraints_pin_what_pyproject_names() -> None:
    lines = (line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {canonicalize_name(r.name): r for r in map(Requirement, filter(None, lines))}
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    asked = project["dependencies"] + [line for extra in extras.values() for line in extra]
    for named in map(Requirement, asked):
        if named.name == project["name"]:
            # An extra that holds others.
            assert named.extras <= extras.keys()
            continue
        pin = pins.get(canonicalize_name(named.name))
        assert pin is not None, f"constraints.txt does not pin {named.name}."
        (exact,) = pin.specifier
        assert exact.operator == "==", f"constraints.txt gives a range: {pin}."
        assert named.specifier.contains(exact.version), (
            f"constraints.txt pins {pin}, which pyproject.toml's {named} excludes."
        )
    assert "torchvision" not in pins


@pytest.mark.parametrize("broken", [None, "test", "test-vllm", "test-lower", "test-newest"])
def test_ci_runs_every_suite_and_fails_with_any(tmp_path: Path, broken: str | None) -> None:
    """The script, with a make that notes what it is asked for and fails at one target."""
    (tmp_path / ".ci").mkdir()
    script = Path(shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci"))
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/made\ntest "$1" != "{broken}"\n')
    make.chmod(0o755)
    done = subprocess.run([script], env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True)
    made = (tmp_path / "made").read_text().split()
    assert made[0] == "venv" and (done.returncode == 0) == (broken is None)
    if broken in (None, "test"):
        assert sorted(made) == ["test", "test-lower", "test-newest", "test-vllm", "venv"]
    assert "test" in made


def test_the_workflow_has_an_entry_for_each_minor_version_of_transformers() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    (bound,) = (r for r in map(Requirement, PYPROJECT["project"]["dependencies"]) if r.name == "transformers")
    minors = [f"5.{minor}" for minor in range(100) if bound.specifier.contains(f"5.{minor}")]
    assert minors[0] == "5.16" and len(minors) > 1
    targets = ["test", "test-vllm", "test-lmms", *(f"test-{m}" for m in minors)]
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["target"] == targets


def test_version_is_the_same_in_both_places() -> None:
    tree = ast.parse((ROOT / "kvcapsule" / "_version.py").read_text())
    assigned = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert ast.literal_eval(assigned["__version__"]) == PYPROJECT["project"]["version"]


def import_graph() -> dict[str, set[str]]:
    """Every module of the tree with the modules of the tree that it imports, in functions and under TYPE_CHECKING too.

    A package stands for its __init__.py alone: to import `a.b.c` is an arrow to `a.b.c`, not to `a.b`.
    """
    modules = {module_name(path): path for path in sources()}
    graph = {}
    for module, path in modules.items():
        targets = set()
        for name in imported_names(path.read_text(), module, path.name == "__init__.py"):
            while name and name not in modules:
                name = name.rpartition(".")[0]
            targets.add(name)
        graph[module] = targets - {module, ""}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other (strongly connected components of two or more)."""
    reached = {start: _reached(graph, start) for start in graph}
    groups = {frozenset(b for b in reached[a] if a in reached[b]) for a in graph if a in reached[a]}
    return sorted(sorted(group) for group in groups)


def _reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen.add(module)
            waiting += graph.get(module, ())
    return seen


def test_modules_import_in_no_circle() -> None:
    found = cycles(import_graph())
    assert not found, "\n".join(" <-> ".join(group) for group in found)


def test_folders_of_the_library_import_in_no_circle() -> None:
    """Folders of kvcapsule/, each as one; the package's own __init__ and the command line stand above them."""
    folders: dict[str, set[str]] = {}
    for module, targets in import_graph().items():
        if (folder := _folder(module)) is not None:
            folders.setdefault(folder, set()).update(f for t in targets if (f := _folder(t)) not in (None, folder))
    assert {"segments", "kernels", "codec", "policy", "inference"} <= folders.keys()
    found = cycles(folders)
    assert not found, "\n".join(" <-> ".join(group) for group in found)


def _folder(module: str) -> str | None:
    """The folder of kvcapsule/ that a module lies in; None for the package itself and for what is mapped into it."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] not in ("training", "eval", "checkpoints") else None


def test_circles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert cycles({"a": {"b"}, "b": set()}) == []

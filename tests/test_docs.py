"""The documents: lines of 120 columns, links that lead somewhere, and names of files, modules, make targets and options
that exist."""

import json
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CARDS = [ROOT / "checkpoints" / name / "README.md" for name in ("pages-vlm", "smol-vlm")]
FIRST = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "checkpoints/FORMAT.md", "examples/README.md")
NAMED = [ROOT / name for name in FIRST]
LOG = ROOT / "training" / "NOTES.md"
HISTORY = (LOG, ROOT / "CHANGELOG.md")
"""They may name options of an earlier day."""
PAGES = [*NAMED, LOG, *CARDS, *sorted((ROOT / "docs").glob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
WIDTH = 120
FOLDERS = ("kvcapsule", "training", "eval", "tests", "checkpoints", "docs")
ELSEWHERE = ("tests/utils/test_cache_utils.py", "tests/generation/test_utils.py")
"""Files of transformers."""
MADE = ("eval/results/bench-gpu.", "eval/results/gpu-check.")
"""Files that a command of the page writes, and that need not be there."""
GROUPS = ("kvcapsule.policies", "kvcapsule.families")
"""Groups of entry points, which look like modules."""
OF_VLLM = ("kvcapsule.serving.worker.CapsuleWorker",)
"""Names in modules that import vLLM, which need not be installed."""
OTHER_OPTIONS = {"--suite", "--parts", "--name", "--replace", "--work", "--help", "--version"}
"""Options of programs under `python -m`, and those of every command."""
OF_LMMS_EVAL = {"--model_args", "--include_path", "--batch_size", "--gen_kwargs", "--output_path", "--log_samples"}
OF_LMMS_EVAL |= {"--limit", "--use_cache"}
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`]+)`")
_FILE = re.compile(rf"(?<![\w/.-])((?:{'|'.join(FOLDERS)})/[\w./-]+)")
_MODULE = re.compile(r"\bkvcapsule(?:\.\w+)+")
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*")


def prose(text: str) -> list[str]:
    """Lines outside code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL).splitlines()


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    heads = [line.lstrip("# ") for line in prose(page.read_text()) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_lines_are_not_too_long(page: Path) -> None:
    """But for tables, and for a link or name that cannot be broken."""
    long = [
        line
        for line in prose(page.read_text())
        if len(line) > WIDTH and not line.startswith("|") and max(map(len, line.split())) < WIDTH - 20
    ]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall("\n".join(prose(page.read_text()))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_are_named_exist(page: Path) -> None:
    for code in _CODE.findall(page.read_text()):
        for name in _FILE.findall(code):
            if name not in ELSEWHERE and not name.startswith(MADE):
                assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_modules_that_are_named_exist(page: Path) -> None:
    """`kvcapsule.x.y` is a module, or a name in one."""
    for name in set(_MODULE.findall("\n".join(_CODE.findall(page.read_text())))):
        parts = [] if name in GROUPS else name.split(".")
        depth = next((n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n]))), 0)
        if name in OF_VLLM:
            assert f"class {parts[-1]}(" in (ROOT / Path(*parts[:-1])).with_suffix(".py").read_text()
            continue
        thing: object = import_module(".".join(parts[:depth])) if depth < len(parts) else None
        for part in parts[depth:]:
            assert hasattr(thing, part), name
            thing = getattr(thing, part)


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), flags=re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("page", [page for page in PAGES if page not in HISTORY], ids=lambda page: page.name)
def test_options_that_are_named_exist(page: Path) -> None:
    """Of code in the text: the commands that measured a result, in code blocks, say what was typed then."""
    golden = json.loads((ROOT / "tests" / "golden" / "surface.json").read_text())
    known = OTHER_OPTIONS | OF_LMMS_EVAL | {option for options in golden["options"].values() for option in options}
    known |= {option.replace("_", "-") for option in known}
    codes = _CODE.findall("\n".join(prose(page.read_text())))
    lines = [code for code in codes if "pip " not in code and "pytest" not in code and "python -m " not in code]
    unknown = {option.rstrip(".") for code in lines for option in _OPTION.findall(code)} - known
    assert not {option for option in unknown if not option.startswith("--trainer.")}


def test_a_glossary_term_is_explained_once() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    glossary = text.split("## Glossary")[1].split("\n## ")[0]
    terms = [
        term for row in re.findall(r"^\| \*\*(.+?)\*\* \|", glossary, flags=re.MULTILINE) for term in row.split(", ")
    ]
    assert len(terms) > 50
    assert len(terms) == len(set(terms)), sorted(term for term in terms if terms.count(term) > 1)


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or page.suffix != ".md":
            continue
        seen.add(page)
        targets = (target.partition("#")[0] for target in _LINK.findall("\n".join(prose(page.read_text()))))
        todo += [(page.parent / target).resolve() for target in targets if target and "://" not in target]
    assert set(PAGES) <= seen, sorted(str(page.relative_to(ROOT)) for page in set(PAGES) - seen)


def test_the_tree_is_described() -> None:
    """Every folder of code, and every file that stands in none of the library's, has a line in the tables."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    folders = {path.parent for root in ("kvcapsule", "training", "eval") for path in (ROOT / root).glob("*/*.py")}
    lines = {f"`{folder.relative_to(ROOT)}/`" for folder in folders if "__pycache__" not in folder.parts}
    lines |= {f"`kvcapsule/{file.name}`" for file in (ROOT / "kvcapsule").glob("*.py") if not file.name.startswith("_")}
    lines -= {"`training/recipes/`", "`eval/suites/`"}
    assert {line for line in lines if f"| {line} |" not in text} == set()

"""Every example runs as it stands, and prints what it promises. The two that need vLLM or torchvision are run by
tests/serving/test_served_examples.py, in the environment that has both."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
IN_ANOTHER_ENVIRONMENT = {"serving.py", "video.py"}
_FIRST_PAGE = ["cod 1930", "gnu 323", "boa 386", "sow 662", "dog 28", "asp 8536"]
PRINTED: dict[str, list[str]] = {
    "batch.py": [
        "Read line 1. 'cod 1930'",
        r"Transcribe the page. 'hen 888\npig 6102\nram 6305\neel 277\ncow 1712\nemu 5743'",
        "Read line 2. 'asp 76'",
        "30,105 bytes for 3 images",
    ],
    "chat.py": [
        "Read line 2. gnu 323  (10,043 bytes of images)",
        "Read line 1. cod 686  (20,086 bytes of images)",
    ],
    "compare_policies.py": [
        "full cache                401,440 bytes  'gnu 323'",
        "cross-layer capsule        10,043 bytes  'gnu 323'",
        "4-bit keys and values      55,328 bytes  'gnu 323'",
        "a tenth by attention       40,992 bytes  'gnu 1930'",
        "a tenth, evenly spaced     40,992 bytes  'gnu 61'",
    ],
    "peft_adapter.py": ["gnu 323"],
    "single_image.py": [*_FIRST_PAGE, "image: 10,043 bytes; cache: 157,531; full cache: 491,520"],
    "threads.py": [
        "pages-vlm-cross-layer: 'asp 8536', 10,043 bytes of visual KV",
        "pages-vlm-transform: 'asp 8536', 10,041 bytes of visual KV",
    ],
    "train_jsonl.py": ["runs/example/capsule: transform, for pages-vlm"],
}
MOST_LINES = 40


def names() -> set[str]:
    return {path.name for path in EXAMPLES.glob("*.py")}


@pytest.mark.parametrize("name", sorted(PRINTED))
@pytest.mark.filterwarnings("ignore::kvcapsule.ModelMismatchWarning")  # peft_adapter.py promises one
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == PRINTED[name]


def test_all_are_run() -> None:
    assert set(PRINTED) | IN_ANOTHER_ENVIRONMENT == names()


def test_all_are_in_the_table_and_short() -> None:
    rows = re.findall(r"^\| \[\w+\.py\]\((\w+\.py)\) \|", (EXAMPLES / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(rows) == sorted(names())
    assert not [name for name in names() if len((EXAMPLES / name).read_text().splitlines()) > MOST_LINES]

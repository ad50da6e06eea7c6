"""Every example runs as it stands, and prints what it promises. The two that need vLLM or torchvision are run by
tests/serving/test_served_examples.py, in the environment that has both."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
IN_ANOTHER_ENVIRONMENT = {"serving.py", "video.py"}
PRINTED: dict[str, list[str]] = {
    "threads.py": [
        "pages-vlm-cross-layer: 'asp 8536', 10,043 bytes of visual KV",
        "pages-vlm-transform: 'asp 8536', 10,043 bytes of visual KV",
    ],
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

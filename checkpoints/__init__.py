"""Shipped folders: the demo VLM and the demo capsules, and FORMAT.md, which describes the files of a capsule."""

from pathlib import Path

HERE = Path(__file__).resolve().parent


def shipped(name: str) -> Path | None:
    """The folder of a shipped model or capsule, e.g. "pages-vlm" or "pages-vlm-kvcapsule"; None if nothing of that name
    is shipped."""
    return HERE / name if name in shipped_names() else None


def shipped_names() -> list[str]:
    """All names that `shipped` knows."""
    return sorted(path.parent.name for path in HERE.glob("*/config.json"))


def shipped_capsules() -> list[str]:
    """Those of `shipped_names` that are capsules: a model has no recipe."""
    return [name for name in shipped_names() if (HERE / name / "recipe.yaml").is_file()]

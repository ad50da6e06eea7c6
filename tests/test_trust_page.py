"""docs/trust.md names the last counts of the fuzzers: those of the committed results, in which nothing failed."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
HOUR = 60


def result(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((ROOT / "eval" / "results" / f"fuzz-{name}.json").read_text())
    return values


def folders() -> str:
    r = result("folders")
    return (
        f"{r['count']:,} (seed {r['seed']}): {r['total']['refused']:,} refused, {r['total']['ran']:,} ran,"
        f" {len(r['failures'])} failures; at most {r['slowest_s']:.1f} s, {r['peak_bytes_above_start'] / MIB:.0f} MiB"
    )


def commands() -> str:
    r = result("commands")
    total = r["total"]
    return (
        f"{r['count']:,} (seed {r['seed']}): {total['refused']:,} refused, {total['ended']:,} ended,"
        f" {total['started']:,} came to their work, {len(r['failures'])} failures; at most"
        f" {r['slowest_cpu_s']:.1f} s of CPU, {r['peak_bytes_above_start'] / MIB:.0f} MiB"
    )


def conversations() -> str:
    r = result("cache")
    families = r["families"].values()
    return (
        f"{r['minutes']:.0f} minutes (seed {r['seed']}): {sum(f['conversations'] for f in families):,} conversations,"
        f" {sum(f['steps'] for f in families):,} steps, {r['differences']} differences"
    )


def kills() -> str:
    r = result("kills")
    by = ", ".join(f"{count} of {name}" for name, count in r["kills"].items())
    resumed = r["next_runs"]["train"]["resumed"]
    return f"{r['times']} (seed {r['seed']}: {by}): {len(r['failures'])} failures; {resumed} trainings were resumed"


@pytest.mark.parametrize("counts", [folders, commands, conversations, kills], ids=lambda counts: counts.__name__)
def test_the_page_has_the_counts_of_the_results(counts: Any) -> None:
    assert counts() in (ROOT / "docs" / "trust.md").read_text()


def test_the_bars_were_met() -> None:
    assert all(not result(name)["failures"] for name in ("folders", "commands", "kills"))
    assert result("folders")["count"] == result("commands")["count"] == 10_000
    assert result("folders")["slowest_s"] < 5 and result("commands")["slowest_cpu_s"] < 5
    assert max(result(name)["peak_bytes_above_start"] for name in ("folders", "commands")) < 2**30
    assert result("cache")["differences"] == 0 and result("cache")["minutes"] >= HOUR
    assert result("kills")["times"] == 200

"""Runs that are killed with signal 9 in the midst: nothing is half written, and the next run leaves no litter.

    python tests/fuzz/kills.py --times 200 --seed 1 --json eval/results/fuzz-kills.json

Killed are saves of capsules, `kvcapsule train` (also with --harvests), `kvcapsule eval` and writes to an image store:
before a step of their writing that is drawn at random, shortly behind one, or at a random moment. Then it is checked
that each file is the old one or the new one, whole; the same is run again, resumed where that is offered, and compared
with a run that nobody killed. tests/fuzz/test_kills.py does so a few times.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from kill_commands import Evaluations, Harvests, Trainings
from kill_switch import Kill, in_child, killed, measured
from kill_targets import Saves, Stores, Target

from kvcapsule.environment import machine, versions

TARGETS: dict[str, type[Target]] = {
    "save": Saves,
    "store": Stores,
    "train": Trainings,
    "harvest": Harvests,
    "eval": Evaluations,
}
SHARES = {"save": 0.3, "store": 0.2, "train": 0.2, "harvest": 0.15, "eval": 0.15}
"""Of the kills, by what is killed."""
_MOST_TRIES = 50
"""Runs that may end before their moment comes, one after another."""


@dataclass
class Report:
    """What became of the runs."""

    kills: Counter[str] = field(default_factory=Counter)
    """By target."""
    moments: Counter[str] = field(default_factory=Counter)
    """By kind of moment."""
    next_runs: dict[str, Counter[str]] = field(default_factory=dict)
    """By target, what the next run did."""
    steps: dict[str, dict[str, int]] = field(default_factory=dict)
    """Steps of writing in a run that nobody kills, by target and variant, and by name."""
    failures: list[str] = field(default_factory=list)


def kill(
    counts: dict[str, int],
    seed: int,
    progress: Callable[[str], None] = lambda line: None,
    targets: dict[str, type[Target]] = TARGETS,
) -> Report:
    """Kill each target so many times.

    Args:
        counts: by the target's name.
        seed: of the moments.
        progress: called with a line now and then.
        targets: by name.
    """
    report = Report()
    with tempfile.TemporaryDirectory() as name:
        room = Path(name).resolve()
        (room / "temporary").mkdir()
        before, tempfile.tempdir = tempfile.tempdir, str(room / "temporary")
        try:
            for target, count in counts.items():
                _kill_target(target, targets[target], count, room, (seed, report, progress))
        finally:
            tempfile.tempdir = before
    return report


def _kill_target(
    name: str, kind: type[Target], count: int, room: Path, about: tuple[int, Report, Callable[[str], None]]
) -> None:
    seed, report, progress = about
    (room / name).mkdir()
    target, place = kind(room / name), room / "place"
    target.prepare()
    whole: dict[str, tuple[list[str], float]] = {}
    for number in range(count):
        draw = random.Random(f"{seed} {name} {number}")
        variant = target.variants[number % len(target.variants)]
        if variant not in whole:
            _empty(place, room)
            target.reset(place, variant)
            whole[variant] = measured(partial(target.act, place, variant), place)
            report.steps[f"{name} {variant}".strip()] = dict(Counter(whole[variant][0]))
        for _ in range(_MOST_TRIES):
            moment, when = _drawn(draw, *whole[variant])
            _empty(place, room)
            target.reset(place, variant)
            try:
                if not killed(partial(target.act, place, variant), when, place):
                    continue
                report.kills[name] += 1
                report.moments[moment] += 1
                in_child(partial(target.check, place, variant))
                came = in_child(partial(target.again, place, variant))
                report.next_runs.setdefault(name, Counter())[came] += 1
            except AssertionError:
                report.failures.append(
                    f"kill {number} of {name}, seed {seed}, {variant}, {when}: {traceback.format_exc()[-1200:]}"
                )
                progress(report.failures[-1])
            break
        else:
            report.failures.append(f"{name} {variant}: {_MOST_TRIES} runs ended before they were killed")
        if (number + 1) % 10 == 0:
            progress(f"{name}: {number + 1} of {count}, {len(report.failures)} failures")


def _drawn(draw: random.Random, steps: Sequence[str], seconds: float) -> tuple[str, Kill]:
    """A random moment of a run of these steps and seconds; a kind of step is drawn first, as some are rare and matter
    most."""
    if draw.random() < 0.3:
        return "at a moment", Kill(None, draw.uniform(0, seconds))
    kinds = sorted(set(steps))
    name = draw.choice([*kinds, *2 * [kind for kind in kinds if kind in ("rename", "exchange")]])
    number = draw.choice([number for number, step in enumerate(steps, 1) if step == name])
    if draw.random() < 0.7:
        return f"before a step: {name}", Kill(number, 0.0)
    return f"behind a step: {name}", Kill(number, draw.uniform(1e-5, 1e-3))


def _empty(place: Path, room: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    shutil.rmtree(room / "temporary")
    for folder in (place, room / "temporary"):
        folder.mkdir()


def shared_out(times: int, names: Sequence[str]) -> dict[str, int]:
    """So many kills by target."""
    total = sum(SHARES[name] for name in names)
    counts = {name: int(times * SHARES[name] / total) for name in names}
    counts[names[0]] += times - sum(counts.values())
    return counts


def command() -> int:
    parser = argparse.ArgumentParser(description="Kill runs in the midst, and look at what they leave.")
    parser.add_argument("--times", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the counts")
    chosen = parser.parse_args()
    # A process that is to fork has one thread.
    torch.set_num_threads(1)
    report = kill(
        shared_out(chosen.times, chosen.only.split(",")), chosen.seed, partial(print, file=sys.stderr, flush=True)
    )
    result: dict[str, Any] = {
        "command": f"python tests/fuzz/kills.py --times {chosen.times} --seed {chosen.seed}",
        "times": sum(report.kills.values()),
        "seed": chosen.seed,
        "kills": dict(report.kills),
        "moments": dict(report.moments),
        "next_runs": {name: dict(counts) for name, counts in report.next_runs.items()},
        "steps_of_writing": report.steps,
        "failures": report.failures,
        "versions": versions(),
        "machine": machine(),
    }
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(
        f"{result['times']} kills {result['kills']}, {len(report.failures)} failures; next runs {result['next_runs']}"
    )
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(command())

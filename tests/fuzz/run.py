"""Random conversations with a cache for a given time, family by family.

    python tests/fuzz/run.py --minutes 60 --seed 1 --json eval/results/fuzz-cache.json

It stops at the first difference and prints the shortest sequence that shows it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from support.cache_machine import FAMILIES, attached, machine

from kvcapsule.environment import machine as computer
from kvcapsule.environment import versions

_ROUND = 40
"""Conversations of a family in one round."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=40, help="most steps of a conversation")
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    options = settings(
        max_examples=_ROUND,
        stateful_step_count=parsed.steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    kinds = {family: machine(family) for family in FAMILIES}
    end, rounds = time.monotonic() + 60 * parsed.minutes, 0
    while time.monotonic() < end:
        for number, kind in enumerate(kinds.values()):
            with attached(kind):
                run_state_machine_as_test(seed(parsed.seed + 1000 * rounds + number)(kind), settings=options)
        rounds += 1
        print(f"round {rounds}: {sum(kind.steps for kind in kinds.values()):,} steps, no difference", flush=True)
    result = {
        "minutes": parsed.minutes,
        "seed": parsed.seed,
        "differences": 0,
        "families": {f: {"conversations": k.conversations, "steps": k.steps} for f, k in kinds.items()},
        "machine": computer(),
        "versions": versions(),
    }
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["families"], indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

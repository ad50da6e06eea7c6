"""Some random conversations of each family; `make fuzz` runs them for an hour."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from support.cache_machine import FAMILIES, attached, machine


@pytest.mark.parametrize("family", FAMILIES)
def test_random_conversations(family: str) -> None:
    kind = machine(family)
    options = settings(
        max_examples=10,
        stateful_step_count=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with attached(kind):
        run_state_machine_as_test(kind, settings=options)

"""Attention over segments of any form is dense attention in float64; hypothesis draws the forms."""

import torch
from hypothesis import given, settings
from support.any_segments import Case, cases
from support.dense_attention import attention

from kvcapsule.kernels import attend, reference

FEW = settings(max_examples=80, deadline=None, database=None, derandomize=True)


def bound(case: Case, expected: torch.Tensor) -> float:
    """Largest difference that rounding may make: of the sums, in float64 if all is, and of the output's own type."""
    exact = case.query.dtype == case.stored == torch.float64
    size = max(1.0, float(expected.abs().max()))
    return size * ((1e-10 if exact else 1e-5) + torch.finfo(case.query.dtype).eps)


@given(cases())
@FEW
def test_the_reference_and_the_kernels_of_this_machine_are_dense_attention(case: Case) -> None:
    expected = attention(case.query, case.segments, case.scale, case.visible)
    for run in (reference.attend, attend):
        out = run(case.query, case.segments, case.scale, case.visible)
        assert out.dtype == case.query.dtype and out.shape == case.query.shape
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=bound(case, expected))

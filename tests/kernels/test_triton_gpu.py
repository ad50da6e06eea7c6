"""Compiled on a GPU, the Triton kernels agree with the reference in every precision, on the cases of test_triton.py.

`make gpu-check` runs this. Without a CUDA device there is nothing to test: the kernels would be interpreted.
"""

from collections.abc import Callable

import pytest
import torch
from support.random_segments import OWNERS, query_of
from support.triton_cases import FORMS, SMALL, TOLERANCE, Case, error

from kvcapsule.kernels.triton import arguments
from kvcapsule.segments.segment import Segment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]


def test_the_kernels_are_compiled() -> None:
    assert not arguments.INTERPRETED


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [*SMALL, *FORMS])
def test_shared_cases(name: str, dtype: torch.dtype) -> None:
    assert error((SMALL | FORMS)[name](dtype)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_kind(kind: str, dtype: torch.dtype, random_segment: Callable[..., Segment]) -> None:
    segments = [random_segment(kind, owner, seed, dtype) for seed, owner in enumerate(OWNERS)]
    case = Case(query_of(dtype=dtype), [*segments, random_segment("raw", [0, 1, 2, 3], 7, dtype)])
    assert error(case, by_reference=2 * (kind == "mlp")) < TOLERANCE[dtype]

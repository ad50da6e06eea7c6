"""Attention over segments: a reference in plain PyTorch, and kernels in Triton and in C++ that agree with it.

What runs is chosen once for each kind of device: Triton's kernels on CUDA where Triton is installed
(`pip install kvcapsule[triton]`), those in C++ on the CPU where there is a compiler (`kvcapsule[cpu]` brings one), the
reference everywhere else. The environment variable KVCAPSULE_KERNELS=reference, =cpu or =triton, read at the first
call, overrides the choice; on the CPU `triton` needs TRITON_INTERPRET=1 besides, and is for tests. What kernels do not
cover, they leave to the reference, decided by a segment's form alone: nothing falls back because something failed.
"""

from collections.abc import Sequence

import torch

from ..segments.segment import Segment
from .backend import backend_for
from .cpu.attend import attend as attend_on_cpu
from .reference import attend as reference_attend

__all__ = ["attend", "backend_for"]


def attend(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None = None
) -> torch.Tensor:
    """As kvcapsule.kernels.reference.attend, by the backend of the query's device."""
    chosen = backend_for(query.device.type)
    if chosen == "triton":
        out: torch.Tensor = _attend_by_triton(query, segments, scale, visible)
        return out
    # A step that PyTorch compiles whole is the reference's.
    if chosen == "cpu" and not torch.compiler.is_compiling():
        return attend_on_cpu(query, segments, scale, visible)
    return reference_attend(query, segments, scale, visible)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _attend_by_triton(
    query: torch.Tensor, segments: Sequence[Segment], scale: float, visible: torch.Tensor | None
) -> torch.Tensor:
    """The kernels bring their own launches, which the compiler leaves as they are."""
    from .triton.attend import attend as chosen

    return chosen(query, segments, scale, visible)

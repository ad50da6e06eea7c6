"""A second device on a machine that has none: tensors that compute on the CPU, and refuse what an accelerator would.

Inside `pretended()` a tensor of the device "pretend" cannot meet one of the CPU's in an operation, unless that has a
single element, as on CUDA. What makes the host wait for an accelerator is counted: a number that is read (item, tolist,
bool, a comparison of tensors), an operation whose output has a size that the data decide (nonzero, unique, a boolean
index), a copy to the host, an index from the host. Other copies from the host are not counted, though CUDA waits for
those that are not `non_blocking`.

It stands on torch's registration of Python backends, which is experimental.
"""

import collections
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretend"
_SIZED_BY_DATA = (
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave.Tensor",
)
_MAY_MIX = ("index.Tensor", "index_put")
"""Operations of an accelerator that take indices from the host."""


class _Module(_DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def is_autocast_enabled(self) -> bool:
        return False


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class MixedDevicesError(RuntimeError):
    """Tensors of two devices met in one operation."""


class Waits(collections.Counter[tuple[str, str]]):
    """How often the host waited for the device, by what for and by the line that asked."""

    def of(self, *parts: str) -> int:
        """Those whose line is in a file whose path has one of these parts."""
        return sum(count for (_, where), count in self.items() if any(part in where for part in parts))


waits = Waits()


def _wait(kind: str) -> None:
    frame: Any = sys._getframe(1)
    while frame is not None and not _ours(frame.f_code.co_filename):
        frame = frame.f_back
    name = "elsewhere" if frame is None else frame.f_code.co_filename
    waits[kind, f"{name}:{0 if frame is None else frame.f_lineno}"] += 1


def _ours(path: str) -> bool:
    packages = ("/kvcapsule/", "/training/", "/eval/", "/site-packages/transformers/")
    return any(part in path for part in packages) and "/torch/" not in path


class PretendTensor(torch.Tensor):
    """A tensor of the device; what it holds lies on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        made: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        made.held = held.detach()
        return made

    def __repr__(self, **options: Any) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def tolist(self) -> Any:
        _wait("tolist")
        return self.held.tolist()

    def numpy(self, *args: Any, **options: Any) -> Any:
        raise TypeError("a tensor of an accelerator has no numpy array: copy it to the host first.")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees the operations that make tensors, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _held(x: Any) -> Any:
    if isinstance(x, PretendTensor):
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x


def _on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = str(func).removeprefix("aten.")
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, PretendTensor)]
    device = kwargs.get("device")
    if name.startswith("_to_copy"):
        there = ours or not tensors
        if there and device is not None and not _on_device(device):
            _wait("copy to the host")
        out = func(_held(args[0]), **{k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")})
        stays = isinstance(args[0], PretendTensor) if device is None else _on_device(device)
        return PretendTensor(out) if stays else out
    if name.startswith(("copy_.", "_copy_from.")):
        if isinstance(args[1], PretendTensor) and not isinstance(args[0], PretendTensor):
            _wait("copy to the host")
        func(*tree_map(_held, args), **kwargs)
        return args[0]
    if ours:
        host = [x for x in tensors if not isinstance(x, PretendTensor) and x.dim() > 0]
        if host and name.startswith(_MAY_MIX) and isinstance(args[0], PretendTensor):
            _wait("an index from the host")
        elif host:
            raise MixedDevicesError(
                f"{name}: tensors of two devices: {[(tuple(x.shape), x.device.type) for x in tensors]}"
            )
        _count(name, args)
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not (_on_device(device) if device is not None else ours):
        return out
    known = {id(x.held): x for x in ours}

    def given(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, PretendTensor):
            return x
        return known.get(id(x)) if id(x) in known else PretendTensor(x)

    return tree_map(given, out)


def _count(name: str, args: Any) -> None:
    if name.startswith("_local_scalar_dense"):
        _wait("item")
    elif name.startswith("equal"):
        _wait("equal")
    elif name.startswith(_SIZED_BY_DATA):
        _wait(name.partition(".")[0])
    elif name.startswith("index") and any(
        isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
        for part in args[1:2]
        if isinstance(part, list | tuple)
        for x in part
    ):
        _wait("boolean index")


@contextmanager
def pretended() -> Iterator[Waits]:
    """Within the block the device is there; gives the waits since it began."""
    waits.clear()
    with _Mode():
        yield waits


def to_device(module: torch.nn.Module) -> torch.nn.Module:
    """Move a module to the device, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = PretendTensor(parameter.detach().clone())
                part._parameters[name] = torch.nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer.detach().clone())
    return module


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> torch.Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


def _empty(size: Any, *, dtype: Any = None, **options: Any) -> torch.Tensor:
    return PretendTensor(torch.empty(size, dtype=dtype))


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target  # type: ignore[no-any-return]


_library = torch.library.Library("aten", "IMPL")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")

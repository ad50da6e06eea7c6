"""Tensors of a capsule file of format version 2: in 16 bits, without maps of encoders that those of decoders give.

In memory they are as ever: fp32, and complete. What 16 bits cost is in training/NOTES.md: nothing that can be told.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import nn

from .tensor_bytes import Form

_DECODERS: Final = {".tokens_in": ".tokens_out", ".channels_in": ".channels_out"}
"""Ends of the names of encoders' maps, and of the decoders' maps beside them."""
_PRECISION = 2.0**-10
"""Largest error of a number in 16 bits, relative to the largest number of its tensor."""


def lean(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What is written of tensors. Those that are in fp32 are read back so, rounded to float16."""
    small = {name: _in_16_bits(tensor.detach()) for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in small.items() if not _given(name, tensor, small)}


def with_given(forms: Mapping[str, Form]) -> dict[str, Form]:
    """The forms of a file's tensors with those of the maps that are not in it."""
    complete = dict(forms)
    for name, form in forms.items():
        for encoder, decoder in _DECODERS.items():
            if name.endswith(decoder) and (missing := name.removesuffix(decoder) + encoder) not in forms:
                shape = (*form.shape[:-2], *form.shape[:-3:-1])
                complete[missing] = Form(form.dtype, shape if encoder == ".tokens_in" else form.shape)
    return complete


def restored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file in fp32, and the maps that are not in it. They are taken out of `tensors` one by one, so
    that not all of them are in memory twice."""
    complete: dict[str, torch.Tensor] = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        complete[name] = tensor.float() if tensor.dtype == torch.float16 else tensor
    for name in list(complete):
        for encoder, decoder in _DECODERS.items():
            if name.endswith(decoder) and (missing := name.removesuffix(decoder) + encoder) not in complete:
                complete[missing] = _turned(encoder, complete[name]).clone(memory_format=torch.contiguous_format)
    return complete


def round_as_written(module: nn.Module) -> None:
    """Give a codec the numbers that a file of it holds."""
    kept = restored(lean(module.state_dict()))
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(kept[name])


def _in_16_bits(tensor: torch.Tensor) -> torch.Tensor:
    """In float16, unless that loses more than rounding: numbers too large or too small for it."""
    if tensor.dtype != torch.float32 or not tensor.numel():
        return tensor
    half = tensor.half()
    lost = (half.float() - tensor).abs().amax()
    vanished = ((half == 0) & (tensor != 0)).any() and tensor.amin() > 0
    fine = bool(lost <= _PRECISION * tensor.abs().amax()) and not bool(vanished)
    return half if fine else tensor


def _given(name: str, tensor: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is an encoder's map that the decoder's gives."""
    for encoder, decoder in _DECODERS.items():
        if name.endswith(encoder):
            other = tensors.get(name.removesuffix(encoder) + decoder)
            return other is not None and other.dtype == tensor.dtype and torch.equal(_turned(encoder, other), tensor)
    return False


def _turned(encoder: str, decoder: torch.Tensor) -> torch.Tensor:
    """The encoder's map of a decoder's: along the tokens its transpose, along the channels itself."""
    return decoder.transpose(-1, -2) if encoder == ".tokens_in" else decoder

"""The paged KV cache of a layer as vLLM's CPU backend lays it out, as segments and tensors of this project."""

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from ..errors import ModelError
from ..segments.segment import Segment


class PagedCache:
    """Keys and values of one layer in blocks: a segment whose entries are the blocks."""

    def __init__(self, cache: torch.Tensor) -> None:
        """cache: vLLM's own, [blocks, H, block, 2 D]."""
        blocks, heads, block, both = cache.shape
        self.block, dim = block, both // 2
        entry, head = cache.stride(0), cache.stride(1)
        if cache.stride()[2:] != (both, 1):
            raise ModelError(f"vLLM's KV cache has strides {cache.stride()}, and heads of a block that lie apart.")
        first, shape = cache.storage_offset(), (blocks, heads, block, dim)
        # Within a block and head the keys come first, channel by channel, and then the values, token by token.
        keys = cache.as_strided(shape, (entry, head, 1, block), first)
        values = cache.as_strided(shape, (entry, head, dim, 1), first + block * dim)
        self.segment = Segment(keys, values, torch.arange(blocks))

    def read(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of whole blocks [B, n], one after the other: [B, H, n * block, D] each."""
        keys, values = (x[blocks].transpose(1, 2).flatten(2, 3) for x in self._rows())
        return keys, values

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._rows()[0].dtype

    def rows(self, blocks: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of single tokens, each given by block and place in it: [1, H, N, D] each."""
        keys, values = (x[blocks, :, offsets].transpose(0, 1)[None] for x in self._rows())
        return keys, values

    def write(self, blocks: torch.Tensor, offsets: torch.Tensor, rows: Segment, first: int = 0) -> None:
        """Overwrite the keys and values of single tokens with raw rows [1, H, N, D], from row `first` on."""
        for x, new in zip(self._rows(), (rows.keys, rows.values), strict=True):
            assert isinstance(new, torch.Tensor)
            x[blocks, :, offsets] = new[0, :, first:].transpose(0, 1)

    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.segment.keys, self.segment.values
        assert isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor)
        return keys, values


def readable_isa(isa: str) -> str:
    """The kernels of vLLM's CPU backend to use in place of `isa`: those for AMX lay out a block in an order of their
    own, those for vectors in PagedCache's."""
    return "vec" if isa == "amx" else isa


def check_layout(dtype: torch.dtype, heads: int, block: int, dim: int) -> None:
    """Write numbered tokens into a block, and raise ModelError if PagedCache does not read them."""
    isa = readable_isa(_get_attn_isa(dtype, block, dim, "auto"))
    numbers = torch.arange(2 * block * heads * dim, dtype=torch.float64) % 251
    keys, values = numbers.to(dtype).view(2, block, heads, dim)
    cache = torch.zeros(2, heads, block, 2 * dim, dtype=dtype)
    halves = cache.view(2, heads, 2 * block, dim).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, *halves, torch.arange(block, 2 * block), isa)
    read = PagedCache(cache).read(torch.tensor([[1]]))
    if any(not torch.equal(x[0], y.transpose(0, 1)) for x, y in zip(read, (keys, values), strict=True)):
        raise ModelError(
            f"vLLM's CPU backend ({isa}, {dtype}, blocks of {block} tokens, head size {dim}) lays out its KV cache in"
            " an order that is not known here: kvcapsule cannot read it."
        )

"""Codes into bytes."""

import triton
import triton.language as tl


@triton.jit
def pack_codes(codes, packed, count, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Eight codes of BITS bits, `count` times, from codes [count, 8] to packed [count, BITS], both uint8 (kvcapsule.segments.bit_packing)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = i < count
    if BITS == 3:
        # Two bytes of low bits, a third of high bits.
        k = tl.arange(0, 8)
        code = tl.load(codes + i[:, None] * 8 + k[None, :], mask=there[:, None], other=0).to(tl.int32)
        low = tl.sum((code & 3) << (2 * k)[None, :], 1)
        high = tl.sum((code >> 2) << k[None, :], 1)
        tl.store(packed + i * 3, (low & 255).to(tl.uint8), mask=there)
        tl.store(packed + i * 3 + 1, (low >> 8).to(tl.uint8), mask=there)
        tl.store(packed + i * 3 + 2, high.to(tl.uint8), mask=there)
    else:
        byte = tl.arange(0, BITS)[None, :, None]
        lane = tl.arange(0, 8 // BITS)[None, None, :]
        at = i[:, None, None] * 8 + byte * (8 // BITS) + lane
        code = tl.load(codes + at, mask=there[:, None, None], other=0).to(tl.int32)
        joined = tl.sum(code << (lane * BITS), 2)
        to = packed + i[:, None] * BITS + tl.arange(0, BITS)[None, :]
        tl.store(to, joined.to(tl.uint8), mask=there[:, None])

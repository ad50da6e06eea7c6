"""Compact capsules encoded on a CPU: what kvcapsule.codec.attention_matching does in PyTorch, by kernels that take tile by tile, head by head."""

from collections.abc import Callable

import numpy as np
import torch

from . import explained, reading
from .flat import flat
from .jit import U
from .share import run, threads


def read(queries_HQD: torch.Tensor, k_HETD: torch.Tensor, scores: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Scores and attention [H, E, T, Q] into memory; log of the mass [H, E, 1, Q], mean square and mean of a token's shares [H, E, T]."""
    heads, tiles, tokens, dim = k_HETD.shape
    queries = queries_HQD.shape[1]
    top, sums = (k_HETD.new_empty(heads, tiles, 1, queries) for _ in range(2))
    energy, mass = (k_HETD.new_empty(heads, tiles, tokens) for _ in range(2))
    across = queries_HQD.transpose(1, 2).contiguous()
    steps = (U(step) for step in k_HETD.stride()[:3])
    given = (flat(k_HETD), *steps, U(tiles), flat(across), (U(tokens), U(dim), U(queries)))
    out = tuple(map(flat, (scores, attention, top, sums, energy, mass)))
    _shared_out(heads * tiles, tokens * queries * dim, lambda begin, end: reading.read(*given, *out, begin, end))
    return top + sums.log(), energy, mass


def targets(
    attention_HETQ: torch.Tensor, v_HETD: torch.Tensor, chosen_HECQ: torch.Tensor | None, mass: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_C^T A [H, E, C, T], and [H, E, C, D + 1]: its product with the values and with `mass` in units of their size.

    chosen: the rows C of the attention; None where all are.
    """
    heads, tiles, tokens, queries = attention_HETQ.shape
    dim = v_HETD.shape[3]
    chosen = attention_HETQ if chosen_HECQ is None else chosen_HECQ
    rows = chosen.shape[2]
    shared, target = (attention_HETQ.new_empty(heads, tiles, rows, size) for size in (tokens, dim + 1))
    steps = (U(step) for step in v_HETD.stride()[:3])
    sizes = tuple(map(U, (rows, tokens, dim, queries)))
    given = (flat(chosen), flat(attention_HETQ), chosen_HECQ is None, flat(v_HETD), *steps, U(tiles), sizes, np.float32(mass))
    out = flat(shared), flat(target)
    _shared_out(heads * tiles, rows * tokens * (queries + dim), lambda begin, end: explained.targets(*given, *out, begin, end))
    return shared, target


def products(x_HEMQ: torch.Tensor, y_HETQ: torch.Tensor) -> torch.Tensor:
    """[H, E, M, T]: of each row of x with each of y."""
    (heads, tiles, many, length), rows = x_HEMQ.shape, y_HETQ.shape[2]
    out = x_HEMQ.new_empty(heads, tiles, many, rows)
    given = flat(x_HEMQ.contiguous()), flat(y_HETQ.contiguous()), U(many), U(rows), U(length), flat(out)
    _shared_out(heads * tiles, many * rows * length, lambda begin, end: explained.products(*given, begin, end))
    return out


def added(gram: torch.Tensor, target: torch.Tensor, ranking: torch.Tensor, passes: int, jitter: float) -> torch.Tensor:
    """As kvcapsule.codec.attention_matching.added."""
    many, wide = target.shape[2:]
    out = torch.empty_like(ranking, memory_format=torch.contiguous_format)
    given = tuple(flat(x.contiguous()) for x in (gram, target, ranking))
    more = (U(many), U(wide), U(passes)), np.float32(jitter), np.finfo(np.float32).tiny, flat(out)
    pairs = out[..., 0].numel()
    _shared_out(pairs, passes * many * many * (wide + many // 3) // 2, lambda begin, end: explained.added(*given, *more, begin, end))
    return out


def _shared_out(pairs: int, work: int, kernel: Callable[[np.uint64, np.uint64], None]) -> None:
    """A kernel of pairs begin .. end, by as many threads as so many multiply-adds a pair are worth."""
    many = min(threads(pairs * work), pairs)
    cuts = [U(pairs * i // many) for i in range(many + 1)]
    run(lambda i: kernel(cuts[i], cuts[i + 1]), range(many))

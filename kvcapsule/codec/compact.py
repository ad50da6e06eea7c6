"""Compact capsules by attention matching (arXiv 2602.16284): a few of a tile's keys, one bias per key, and refitted
values.

For one layer, one KV head and one tile of T tokens, with a query bank of Q training queries B [Q, D] and
A = softmax(scale B K^T) [Q, T]:

    kept     m = ceil(r T) of the tile's tokens, selected per image and head
    bias     b = log w, w > 0 with A_kept w ~ 1: for every query of the bank, the kept keys carry the softmax mass of
             the full tile
    values   C with softmax(scale B K_kept^T + b) C ~ A V

K_kept, C and b are stored; attention reads them as plain rows with a bias. Only the encoder uses the query bank and the
selector.

Approximations: attention is matched for the bank's queries alone, and these come from other images (the paper's come
from the context that it compacts). An unregularised fit overfits them, so the weights are regularised towards a
nearest-key assignment and the values towards the means of the tokens assigned to a key. Tiles are matched
independently: their common softmax enters through the masses alone.

The selection of tokens matters most. A ranking by attention keeps redundant tokens; each of `passes` re-ranks tokens by
their marginal gain over the tokens ranked above: the paper's orthogonal matching pursuit with a fixed order in place of
its loop over tokens. Candidates are the C tokens that the first ranking puts first: 4 per kept token, and at least 112.

Cost of encoding, in multiplications per tile and KV head: Q T (D + m) + Q m^2 + 2 T m D + m^3 / 3; with passes C T
(Q + D) once, and C^3 / 6 + C^2 D / 2 per pass. Two tensors of Q T numbers per tile and head are in memory, for all that
are encoded at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import NamedTuple

import torch

from ..errors import ConfigError
from ..field_checks import check_least
from ..methods.ratios import check_ratio, retained
from ..segments.quantized_rows import QuantizedRows
from ..vlm.geometry import KVGeometry
from .attention_matching import (
    BankAttention,
    bank_attention,
    gather_rows,
    marginal_gains,
    products,
    targets,
    top_tokens,
)
from .base import CodecConfig, Encoded, KeyPart, LayerCodec, ValuePart
from .refit import assigned_shares, attention_of_kept_keys, attention_of_read_keys, fit_bias, refit_values
from .token_selector import TokenSelector

SELECTORS = ("attention", "learned")
_SHORTLIST = 4
"""Candidates per kept token in the passes ..."""
_SHORTEST = 112
"""... and their smallest number."""
_AT_ONCE = 2**20
"""Elements of A processed at once on a CPU (at least one tile): 2 x 4 MB of fp32 fit into the last-level cache."""
_AT_ONCE_ELSEWHERE = 2**27
"""The same on other devices, where calls cost more: a bound on memory."""


class KeptTokens(NamedTuple):
    """The tokens of tiles whose keys are kept."""

    kept: torch.Tensor
    """[E, H, M] indices, ascending."""
    shared: torch.Tensor | None = None
    """A_kept^T A, [E, H, M, T], if the selection computed it."""


class Block(NamedTuple):
    """Some heads of some tiles, on their way to being encoded. Heads come first, as in memory: what stands as E and H
    elsewhere is H and E here."""

    at: tuple[slice, slice]
    """Its tiles and heads."""
    reading: BankAttention
    keys: torch.Tensor
    """[H, E, T, D]."""
    values: torch.Tensor
    """[H, E, T, D]."""
    kept: KeptTokens


class CompactLayer(LayerCodec):
    """Compact codec of one layer: encodes keys and values together."""

    borrows_tiles = True
    bank: torch.Tensor

    def __init__(self, heads: int, dim: int, stored: int, config: "CompactConfig") -> None:
        super().__init__()
        self.stored, self.ridge, self.passes, self.bits = stored, config.ridge, config.passes, config.latent_bits
        self.scale = config.scale or dim**-0.5
        self.register_buffer("bank", torch.zeros(heads, config.bank, dim))
        self.selector = TokenSelector(heads, config.tile, dim, config.hidden) if config.selector == "learned" else None

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        """Encode tiles, some heads and tiles at a time; keys are in the frame of the bank's queries.

        Raises:
            RuntimeError: if the query bank is empty.
        """
        entries, heads = k_EHTD.shape[:2]
        keys, values = (x.new_empty(entries, heads, self.stored, x.shape[3]) for x in (k_EHTD, v_EHTD))
        bias = keys.new_empty(keys.shape[:3])
        for block in self.blocks(k_EHTD, v_EHTD):
            matched = self._matched(block.reading, block.keys, block.values, *block.kept)
            for out, part in zip((keys, values, bias), matched, strict=True):
                out[block.at] = part.transpose(0, 1)
        return Encoded(KeyPart(keys), ValuePart(values), bias)

    def blocks(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Iterator[Block]:
        """Some heads and tiles at a time, with their attention under the bank and the tokens to keep. What a block
        holds is overwritten by the next.

        Raises:
            RuntimeError: if the query bank is empty.
        """
        queries = self.queries(k_EHTD.dtype)
        (entries, heads, tile, _), bank = k_EHTD.shape, queries.shape[1]
        ranking = None if self.selector is None else self.selector(k_EHTD, v_EHTD)
        pairs = max(1, (_AT_ONCE if k_EHTD.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // (bank * tile))
        # Tiles of one head use the same queries, so heads are the outer loop.
        by_tiles = min(entries, pairs)
        by_heads = min(heads, pairs // by_tiles)
        # Reused for all blocks: newly allocated pages would cost a quarter of the time.
        workspace = queries.new_empty(2, by_tiles * by_heads * bank * tile)
        for head, entry in product(range(0, heads, by_heads), range(0, entries, by_tiles)):
            at = slice(entry, entry + by_tiles), slice(head, head + by_heads)
            # Heads first, as in memory.
            k, v = k_EHTD[at].transpose(0, 1), v_EHTD[at].transpose(0, 1)
            shape = (*k.shape[:2], tile, bank)
            reading = bank_attention(queries[at[1], None], k, workspace[:, : prod(shape)].view(2, *shape))
            kept = self.choose(reading, k, v, None if ranking is None else ranking[at].transpose(0, 1))
            yield Block(at, reading, k, v, kept)

    def queries(self, dtype: torch.dtype) -> torch.Tensor:
        """The bank's queries times the scale of the scores, in fp32; in fp64 for keys of fp64.

        Raises:
            RuntimeError: if the query bank is empty.
        """
        if not bool(self.bank.any()):
            raise RuntimeError(
                "this compact codec's bank of queries is empty, so there is nothing to match: train the capsule, or"
                " fill `bank` with kvcapsule.training.query_bank.QueryBank."
            )
        return self.bank.to(torch.promote_types(dtype, torch.float32)) * self.scale

    def bank_attention(self, k_EHTD: torch.Tensor) -> BankAttention:
        """Attention of the query bank over tiles; raises RuntimeError if the bank is empty."""
        return bank_attention(self.queries(k_EHTD.dtype), k_EHTD)

    def choose(
        self, reading: BankAttention, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, ranking: torch.Tensor | None = None
    ) -> KeptTokens:
        """Select the tokens to keep; ties go to the earlier token. ranking [E, H, T]: of the selector, if already
        computed."""
        if ranking is None:
            ranking = reading.energy if self.selector is None else self.selector(k_EHTD, v_EHTD)
        if not self.passes:
            return KeptTokens(top_tokens(ranking, self.stored))
        competing = min(max(_SHORTLIST * self.stored, _SHORTEST), ranking.shape[-1])
        among = top_tokens(ranking, competing) if competing < ranking.shape[-1] else None
        gram, target, shared = targets(reading, v_EHTD, among)
        ranking = marginal_gains(gram, target, ranking if among is None else ranking.gather(-1, among), self.passes)
        first = top_tokens(ranking, self.stored)
        return KeptTokens(first if among is None else among.gather(-1, first), gather_rows(shared, first))

    def fit(
        self,
        reading: BankAttention,
        k_EHTD: torch.Tensor,
        v_EHTD: torch.Tensor,
        kept_EHM: torch.Tensor,
        shared_EHMT: torch.Tensor | None = None,
    ) -> Encoded:
        """Fit biases and values for selected tokens, to the keys as they will be read (quantised, with latent_bits)."""
        keys, values, bias = self._matched(reading, k_EHTD, v_EHTD, kept_EHM, shared_EHMT)
        return Encoded(KeyPart(keys), ValuePart(values), bias)

    def _matched(
        self,
        reading: BankAttention,
        k_EHTD: torch.Tensor,
        v_EHTD: torch.Tensor,
        kept_EHM: torch.Tensor,
        shared_EHMT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and bias of `fit`."""
        keys = gather_rows(k_EHTD, kept_EHM)
        if self.bits:
            read = QuantizedRows.pack(keys, self.bits).read(reading.attention.dtype)
            attention = attention_of_read_keys(reading, read @ reading.queries.transpose(-1, -2))
            shared_EHMT = None
        else:
            attention = attention_of_kept_keys(reading, kept_EHM)
        share = assigned_shares(reading, attention.rows, kept_EHM, shared_EHMT)
        bias = fit_bias(attention, share).to(k_EHTD.dtype)
        weights = (attention.scores + bias.to(share.dtype)[..., None]).softmax(-2)
        read_values = products(weights, reading.attention) @ v_EHTD.to(share.dtype)
        refit = refit_values(weights, share, v_EHTD, read_values, self.ridge)
        return keys, refit.values.to(v_EHTD.dtype), bias


@dataclass(frozen=True)
class CompactConfig(CodecConfig):
    """Settings of a compact codec."""

    ratios: Sequence[float] = ()
    """Retention ratio per layer, the same for keys and values."""
    bank: int = 512
    """Training queries per KV head in the query bank, for which attention is matched."""
    ridge: float = 1e-3
    """Regularisation of the values towards the means of the tokens assigned to a key, relative to the mean squared
    weight of a row."""
    selector: str = "attention"
    """How tokens are ranked: "attention" (root mean square attention of the query bank) or "learned" (a network)."""
    passes: int = 2
    """Number of times that the ranking is reordered by marginal gain; 0 keeps the highest-ranked tokens."""
    hidden: int = 64
    """Width of the learned selector."""
    scale: float = 0.0
    """Scale of the attention scores; 0: head_dim ** -0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for ratio in self.ratios:
            check_ratio(ratio)
        if self.selector not in SELECTORS:
            raise ConfigError(f"selector {self.selector!r} is neither {' nor '.join(map(repr, SELECTORS))}.")
        check_least(self, {"bank": 1, "hidden": 1, "passes": 0})
        if self.ridge <= 0 or self.scale < 0:
            raise ConfigError(
                f"ridge {self.ridge} must be positive (the fit of the values needs it) and scale {self.scale} not"
                " negative."
            )

    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        return CompactLayer(geometry.kv_heads, geometry.head_dim, self.stored_rows(geometry, layer), self)

    def stored_rows(self, geometry: KVGeometry, layer: int) -> int:
        """Rows of a tile in one layer, numbered among those that get codecs.

        Raises:
            ConfigError: unless there is a retention ratio for each of them.
        """
        layers = len(geometry.capsule_layers)
        if len(self.ratios) != layers:
            raise ConfigError(f"{len(self.ratios)} retention ratios for {layers} layers: give one for each layer.")
        return retained(self.ratios[layer], self.tile)

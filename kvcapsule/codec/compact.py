"""Compact capsules by attention matching (arXiv 2602.16284): few of a tile's own keys, a bias for each, and values
refit to match.

For one layer, one KV head and one tile of T tokens, with a bank of Q training queries B [Q, D] and A = softmax(scale B
K^T) [Q, T]:

    kept     m = ceil(r T) of the tile's tokens, chosen for this image and this head
    bias     b = log w, w > 0 with A_kept w ~ 1: for every query of the bank, the kept keys carry the mass of the whole
             tile
    values   C with softmax(scale B K_kept^T + b) C ~ A V

Stored are K_kept, C and b; attention reads them as plain rows with a bias. The bank and the selector are parameters of
the encoder alone.

What is approximated: attention is matched for the bank's queries alone, and these come from other images (the paper's
come from the context that it compacts). Matched freely they are matched too closely, so the weights are pulled towards
a nearest-key assignment and the values towards the means that it gives. Tiles are matched each for itself: that they
share one softmax enters through the masses alone.

Which tokens are kept matters most. Ranked by attention alone, tokens that do the same work are all kept; each of
`passes` ranks them anew by what a token adds to those above it: the paper's orthogonal matching pursuit with a fixed
order in place of its loop over tokens. They choose from a shortlist of C tokens, those that the first ranking puts
first: 4 for each that is kept, and 112 at least.

Cost of encoding, in multiplications for one tile and KV head: Q T (D + m) + Q m^2 + 2 T m D + m^3 / 3; with passes C T
(Q + D) once, and C^3 / 6 + C^2 D / 2 for each. Q T numbers a tile and head are in memory twice, for as many as are
encoded at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..segments.quantized_rows import QuantizedRows
from ..vlm.geometry import KVGeometry
from .attention_matching import Reading, added, highest, products, read_by, rows_at, targets
from .base import CodecConfig, Encoded, KeyPart, LayerCodec, ValuePart
from .kvcapsule import check_ratio, retained

SELECTORS = ("attention", "learned")
_STEPS = 16
"""Projected gradient steps of the fit of the masses."""
_SHORTLIST = 4
"""Tokens that the passes choose from, those that the first ranking puts first, for each that is kept ..."""
_SHORTEST = 112
"""... and at least."""
_LEAST_MASS = 1e-8
"""Mean attention below which tokens count as equally unread."""
_AT_ONCE = 2**20
"""Numbers of A at once on a CPU, or one tile's: twice 4 MB of fp32 stay in its last cache, and calls hardly show."""
_AT_ONCE_ELSEWHERE = 2**27
"""The same on other devices, whose calls are dearer: a bound of the memory."""


def assignment(alike_EHMT: torch.Tensor, kept_EHM: torch.Tensor) -> torch.Tensor:
    """[E, H, T, M] of 0 and 1: the kept key that is most alike stands for a token; a kept token for itself."""
    stored = kept_EHM.shape[-1]
    own = torch.arange(stored, device=kept_EHM.device).expand_as(kept_EHM)
    return F.one_hot(alike_EHMT.argmax(2).scatter(-1, kept_EHM, own), stored).to(alike_EHMT.dtype)


def fit_masses(rows_EHMQ: torch.Tensor, target_EH1Q: torch.Tensor, start_EHM: torch.Tensor, tile: int) -> torch.Tensor:
    """w [E, H, M] with |w rows - target|^2 + s |w - start|^2 small, between 1 / tile and tile; s is the mean of |a row
    of rows|^2.

    Accelerated projected gradient (Nesterov), a fixed number of steps: near the least-squares solution, not at it.
    """
    start = start_EHM.clamp(1 / tile, tile)
    gram = products(rows_EHMQ, rows_EHMQ)
    pull = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    wanted = products(rows_EHMQ, target_EH1Q)[..., 0] + pull * start
    # No entry is negative, so the greatest row sum bounds the greatest eigenvalue.
    rate = 1 / (gram.sum(-1).amax(-1, keepdim=True) + pull)
    weights = ahead = start
    momentum = 1.0
    for _ in range(_STEPS):
        slope = (gram @ ahead[..., None])[..., 0] + pull * ahead - wanted
        moved = (ahead - rate * slope).clamp(1 / tile, tile)
        following = (1 + sqrt(1 + 4 * momentum**2)) / 2
        ahead = moved + (momentum - 1) / following * (moved - weights)
        weights, momentum = moved, following
    return weights


class Choice(NamedTuple):
    """The tokens of tiles that are kept."""

    kept: torch.Tensor
    """[E, H, M] in rising order."""
    shared: torch.Tensor | None = None
    """A_kept^T A, [E, H, M, T], where choosing them took it."""


class Selector(nn.Module):
    """Ranks a tile's tokens in one pass: two layers over a token's key and value, with an embedding of its place, for
    each KV head.

    All zero until it is trained (kvcapsule.training.query_bank).
    """

    mean: torch.Tensor
    spread: torch.Tensor

    def __init__(self, heads: int, tile: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads, 2 * dim))
        self.register_buffer("spread", torch.ones(heads, 2 * dim))
        self.inner = nn.Parameter(torch.zeros(heads, 2 * dim, hidden))
        self.place = nn.Parameter(torch.zeros(heads, tile, hidden))
        self.outer = nn.Parameter(torch.zeros(heads, hidden, 1))
        self.place_bias = nn.Parameter(torch.zeros(heads, tile))

    def forward(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
        """[E, H, T], greater for tokens to keep."""
        work = torch.promote_types(k_EHTD.dtype, torch.float32)
        mean, spread, inner, place, outer, place_bias = (
            p.to(work) for p in (self.mean, self.spread, self.inner, self.place, self.outer, self.place_bias)
        )
        token = (torch.cat([k_EHTD, v_EHTD], dim=-1).to(work) - mean[:, None]) / spread[:, None]
        return (F.gelu(token @ inner + place) @ outer)[..., 0] + place_bias


class CompactLayer(LayerCodec):
    """Keys and values of one layer, encoded together."""

    bank: torch.Tensor

    def __init__(self, heads: int, dim: int, stored: int, config: "CompactConfig") -> None:
        super().__init__()
        self.stored, self.ridge, self.passes, self.bits = stored, config.ridge, config.passes, config.latent_bits
        self.scale = config.scale or dim**-0.5
        self.register_buffer("bank", torch.zeros(heads, config.bank, dim))
        self.selector = Selector(heads, config.tile, dim, config.hidden) if config.selector == "learned" else None

    def encode(self, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> Encoded:
        """Encode tiles, some heads and tiles at a time; the keys in the frame that the bank's queries were taken to.

        Raises:
            RuntimeError: before the bank is filled.
        """
        queries = self.queries(k_EHTD.dtype)
        (entries, heads, tile, _), bank = k_EHTD.shape, queries.shape[1]
        ranking = None if self.selector is None else self.selector(k_EHTD, v_EHTD)
        pairs = max(1, (_AT_ONCE if k_EHTD.device.type == "cpu" else _AT_ONCE_ELSEWHERE) // (bank * tile))
        # A head's tiles follow one another, and are read by the same queries.
        by_tiles = min(entries, pairs)
        by_heads = min(heads, pairs // by_tiles)
        # Memory for all to use in turn: fresh pages would cost a quarter of the time.
        room = queries.new_empty(2, by_tiles * by_heads * bank * tile)
        keys, values = (x.new_empty(entries, heads, self.stored, x.shape[3]) for x in (k_EHTD, v_EHTD))
        bias = keys.new_empty(keys.shape[:3])
        for head, entry in product(range(0, heads, by_heads), range(0, entries, by_tiles)):
            at = slice(entry, entry + by_tiles), slice(head, head + by_heads)
            # Heads outside tiles, as they lie.
            k, v = k_EHTD[at].transpose(0, 1), v_EHTD[at].transpose(0, 1)
            shape = (*k.shape[:2], tile, bank)
            reading = read_by(queries[at[1], None], k, room[:, : prod(shape)].view(2, *shape))
            choice = self.choose(reading, k, v, None if ranking is None else ranking[at].transpose(0, 1))
            for whole, part in zip((keys, values, bias), self._matched(reading, k, v, *choice), strict=True):
                whole[at] = part.transpose(0, 1)
        return Encoded(KeyPart(keys), ValuePart(values), bias)

    def queries(self, dtype: torch.dtype) -> torch.Tensor:
        """The bank's, times the scale of the scores, in the precision that keys of `dtype` are read in: fp32, or fp64
        for fp64.

        Raises:
            RuntimeError: before the bank is filled.
        """
        if not bool(self.bank.any()):
            raise RuntimeError(
                "this compact codec's bank of queries is empty, so there is nothing to match: train the capsule, or"
                " fill `bank` with kvcapsule.training.query_bank.QueryBank."
            )
        return self.bank.to(torch.promote_types(dtype, torch.float32)) * self.scale

    def read(self, k_EHTD: torch.Tensor) -> Reading:
        """How the bank reads tiles of keys; raises RuntimeError before the bank is filled."""
        return read_by(self.queries(k_EHTD.dtype), k_EHTD)

    def choose(
        self, reading: Reading, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, ranking: torch.Tensor | None = None
    ) -> Choice:
        """The tokens to keep; of equals the earlier one. ranking [E, H, T]: the selector's, where it has spoken
        already."""
        if ranking is None:
            ranking = reading.energy if self.selector is None else self.selector(k_EHTD, v_EHTD)
        if not self.passes:
            return Choice(highest(ranking, self.stored))
        competing = min(max(_SHORTLIST * self.stored, _SHORTEST), ranking.shape[-1])
        among = highest(ranking, competing) if competing < ranking.shape[-1] else None
        gram, target, shared = targets(reading, v_EHTD, among)
        ranking = added(gram, target, ranking if among is None else ranking.gather(-1, among), self.passes)
        first = highest(ranking, self.stored)
        return Choice(first if among is None else among.gather(-1, first), rows_at(shared, first))

    def fit(
        self,
        reading: Reading,
        k_EHTD: torch.Tensor,
        v_EHTD: torch.Tensor,
        kept_EHM: torch.Tensor,
        shared_EHMT: torch.Tensor | None = None,
    ) -> Encoded:
        """Biases and values for a choice of tokens, fitted to the keys as they will be read: quantised where
        latent_bits says so."""
        keys, values, bias = self._matched(reading, k_EHTD, v_EHTD, kept_EHM, shared_EHMT)
        return Encoded(KeyPart(keys), ValuePart(values), bias)

    def _matched(
        self,
        reading: Reading,
        k_EHTD: torch.Tensor,
        v_EHTD: torch.Tensor,
        kept_EHM: torch.Tensor,
        shared_EHMT: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys, values and bias of `fit`."""
        work, tile = reading.attention.dtype, k_EHTD.shape[2]
        keys = rows_at(k_EHTD, kept_EHM)
        if self.bits:
            scores = QuantizedRows.pack(keys, self.bits).read(work) @ reading.queries.transpose(-1, -2)
            # Coarsely quantised keys may outweigh the whole tile.
            top = torch.maximum(reading.log_mass, scores.logsumexp(-2, keepdim=True))
            rows, whole = (scores - top).exp(), (reading.log_mass - top).exp()
            weight = (scores - reading.log_mass).exp().mean(-1)
        else:
            scores, rows = rows_at(reading.scores, kept_EHM), rows_at(reading.attention, kept_EHM)
            whole, weight = torch.ones_like(reading.log_mass), reading.mass.gather(-1, kept_EHM)

        # By the cosine of what tokens get, or as the bank reads the quantised keys; that of the token itself makes no
        # difference.
        if self.bits or shared_EHMT is None:
            shared_EHMT = products(rows, reading.attention)
        length = torch.linalg.vector_norm(rows, dim=-1).clamp_min(1e-12)
        stands_for = assignment(shared_EHMT / length[..., None], kept_EHM)
        mass = reading.mass.clamp_min(_LEAST_MASS)
        share = stands_for * mass[..., None]
        start = share.sum(2) / weight.clamp(_LEAST_MASS, tile)
        bias = fit_masses(rows, whole, start, tile).log().to(k_EHTD.dtype)

        values = v_EHTD.to(work)
        means = (share / share.sum(2, keepdim=True)).transpose(-1, -2) @ values
        weights = (scores + bias.to(work)[..., None]).softmax(-2)
        gram = products(weights, weights)
        left = products(weights, reading.attention) @ values - gram @ means
        ridge = self.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=work, device=gram.device)
        values = means + torch.linalg.solve(gram, left)
        return keys, values.to(v_EHTD.dtype), bias


@dataclass(frozen=True)
class CompactConfig(CodecConfig):
    """Sizes of a compact capsule."""

    ratios: Sequence[float] = ()
    """Retention ratio, layer by layer; keys and values alike, for a row is both."""
    bank: int = 512
    """Training queries of each KV head that attention is matched for."""
    ridge: float = 1e-3
    """Pull of the values towards the means of the tokens that they stand for, relative to the mean energy of a row's
    weights."""
    selector: str = "attention"
    """How tokens are ranked: "attention" (root mean square of the weight that the bank gives them) or "learned" (a
    network)."""
    passes: int = 2
    """Times that the ranking is reordered by what each token adds to those above it; 0 keeps the highest ranked as they
    are."""
    hidden: int = 64
    """Width of the learned selector."""
    scale: float = 0.0
    """Factor of the attention scores; 0 is head_dim ** -0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for ratio in self.ratios:
            check_ratio(ratio)
        if self.selector not in SELECTORS:
            raise ValueError(f"selector {self.selector!r} is neither {' nor '.join(map(repr, SELECTORS))}.")
        for name, least in (("bank", 1), ("hidden", 1), ("passes", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: at least {least} is needed.")
        if self.ridge <= 0 or self.scale < 0:
            raise ValueError(
                f"ridge {self.ridge} must be positive (the fit of the values needs it) and scale {self.scale} not"
                " negative."
            )

    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        if len(self.ratios) != geometry.layers:
            raise ValueError(
                f"{len(self.ratios)} retention ratios for {geometry.layers} layers: give one for each layer."
            )
        return CompactLayer(geometry.kv_heads, geometry.head_dim, retained(self.ratios[layer], self.tile), self)

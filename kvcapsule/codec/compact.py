"""Compact capsules by attention matching (arXiv 2602.16284): few of a tile's own keys, a bias for each, and values refit to match.

For one layer, one KV head and one tile of T tokens, with a bank of Q training queries B [Q, D] and A = softmax(scale B K^T) [Q, T]:

    kept     m = ceil(r T) of the tile's tokens, chosen for this image and this head
    bias     b = log w, w > 0 with A_kept w ~ 1: for every query of the bank, the kept keys carry the mass of the whole tile
    values   C with softmax(scale B K_kept^T + b) C ~ A V

Stored are K_kept, C and b; attention reads them as plain rows with a bias. The bank and the selector are parameters of the encoder alone.

What is approximated: attention is matched for the bank's queries alone, and these come from other images (the paper's come from the
context that it compacts). Matched freely they are matched too closely, so the weights are pulled towards a nearest-key assignment and
the values towards the means that it gives. Tiles are matched each for itself: that they share one softmax enters through the masses alone.

Which tokens are kept matters most. Ranked by attention alone, tokens that do the same work are all kept; each of `passes` ranks them anew
by what a token adds to those above it: the paper's orthogonal matching pursuit with a fixed order in place of its loop over tokens.

Cost of encoding, in multiplications for one tile and KV head: 2 Q T D + Q T m + 2 Q m (m + D) + m^3 / 3; with passes Q T^2 once, and
T^3 / 6 + T^2 D for each. Q T fp32 numbers for every tile and head of a layer are in memory at once, a few times over.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..geometry import KVGeometry
from ..quantize import QuantizedRows
from .base import CodecConfig, Encoded, KeyPart, LayerCodec, ValuePart
from .kvcapsule import check_ratio, retained

SELECTORS = ("attention", "learned")
_JITTER = 1e-4
"""Share of its energy by which a token counts as different from all others: keeps the factorisation of near copies stable in fp32."""
_MASS = 0.3
"""Weight of the tile's mass beside its output where tokens are ranked by what they add, in units of the values' own size."""
_STEPS = 16
"""Projected gradient steps of the fit of the masses."""
_LEAST_MASS = 1e-8
"""Mean attention below which tokens count as equally unread."""


class Reading(NamedTuple):
    """How the bank reads tiles whose tokens are all there. fp32, or fp64 for fp64 keys."""

    queries: torch.Tensor
    """[H, Q, D], times the scale of the scores."""
    attention: torch.Tensor
    """A [E, H, Q, T]."""
    log_mass: torch.Tensor
    """[E, H, Q, 1]: log of the sum that A was divided by."""


def read_by(bank_HQD: torch.Tensor, k_EHTD: torch.Tensor, scale: float) -> Reading:
    work = torch.promote_types(k_EHTD.dtype, torch.float32)
    queries = bank_HQD.to(work) * scale
    scores = queries @ k_EHTD.to(work).transpose(-1, -2)
    log_mass = scores.logsumexp(-1, keepdim=True)
    return Reading(queries, (scores - log_mass).exp(), log_mass)


def targets(reading: Reading, v_EHTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What kept tokens have to explain: the Gram matrix A^T A [E, H, T, T], and A^T of the tile's output and mass, [E, H, T, D + 1]."""
    values = v_EHTD.to(reading.attention.dtype)
    gram = reading.attention.transpose(-1, -2) @ reading.attention
    size = values.square().sum(-1).mean(-1).sqrt()[..., None, None]
    return gram, gram @ torch.cat([values, (_MASS * size).expand(*values.shape[:3], 1)], dim=-1)


def added(gram_EHTT: torch.Tensor, target_EHTC: torch.Tensor, ranking_EHT: torch.Tensor) -> torch.Tensor:
    """What each token explains of the targets that those ranked above it do not, [E, H, T]: one Cholesky factorisation in that order."""
    norm = gram_EHTT.diagonal(dim1=-2, dim2=-1).clamp_min(torch.finfo(gram_EHTT.dtype).tiny).sqrt()[..., None]
    order = ranking_EHT.argsort(dim=-1, descending=True, stable=True)[..., None]
    gram = (gram_EHTT / norm / norm.transpose(-1, -2)).gather(2, order.expand_as(gram_EHTT))
    gram = gram.gather(3, order.transpose(-1, -2).expand_as(gram))
    gram = gram + _JITTER * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    # Not cholesky: it would wait for the device to look for failures, which the jitter rules out.
    root = torch.linalg.cholesky_ex(gram).L
    target = (target_EHTC / norm).gather(2, order.expand_as(target_EHTC))
    gain = torch.linalg.solve_triangular(root, target, upper=False).square().sum(-1)
    return torch.zeros_like(gain).scatter(-1, order[..., 0], gain)


def assignment(reading: Reading, kept_EHQM: torch.Tensor, kept_EHM: torch.Tensor) -> torch.Tensor:
    """[E, H, T, M] of 0 and 1: the kept key that the bank's queries read most alike stands for a token; a kept token for itself."""
    attention, kept = F.normalize(reading.attention, dim=2), F.normalize(kept_EHQM, dim=2)
    nearest = (attention.transpose(-1, -2) @ kept).argmax(-1)
    stored = kept_EHM.shape[-1]
    nearest = nearest.scatter(-1, kept_EHM, torch.arange(stored, device=nearest.device).expand_as(kept_EHM))
    return F.one_hot(nearest, stored).to(attention.dtype)


def fit_masses(rows_EHQM: torch.Tensor, target_EHQ1: torch.Tensor, start_EHM: torch.Tensor, tile: int) -> torch.Tensor:
    """w [E, H, M] with |rows w - target|^2 + s |w - start|^2 small, between 1 / tile and tile; s is the mean of |a column of rows|^2.

    Accelerated projected gradient (Nesterov), a fixed number of steps: near the least-squares solution, not at it.
    """
    start = start_EHM.clamp(1 / tile, tile)
    gram = rows_EHQM.transpose(-1, -2) @ rows_EHQM
    pull = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    wanted = (rows_EHQM.transpose(-1, -2) @ target_EHQ1)[..., 0] + pull * start
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


class Selector(nn.Module):
    """Ranks a tile's tokens in one pass: two layers over a token's key and value, with an embedding of its place, for each KV head.

    All zero until it is trained (kvcapsule.training.matching).
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
        """Encode tiles; the keys in the frame that the bank's queries were taken to.

        Raises:
            RuntimeError: before the bank is filled.
        """
        reading = self.read(k_EHTD)
        return self.fit(reading, k_EHTD, v_EHTD, self.choose(reading, k_EHTD, v_EHTD))

    def read(self, k_EHTD: torch.Tensor) -> Reading:
        """How the bank reads tiles of keys; raises RuntimeError before the bank is filled."""
        if not bool(self.bank.any()):
            raise RuntimeError(
                "this compact codec's bank of queries is empty, so there is nothing to match: train the capsule, or fill `bank` with "
                "kvcapsule.training.matching.QueryBank."
            )
        return read_by(self.bank, k_EHTD, self.scale)

    def choose(self, reading: Reading, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor) -> torch.Tensor:
        """The tokens to keep, [E, H, M] in rising order; of equals the earlier one."""
        ranking = reading.attention.square().mean(2) if self.selector is None else self.selector(k_EHTD, v_EHTD)
        if self.passes:
            gram, target = targets(reading, v_EHTD)
            for _ in range(self.passes):
                ranking = added(gram, target, ranking)
        return ranking.argsort(dim=-1, descending=True, stable=True)[..., : self.stored].sort(-1).values

    def fit(self, reading: Reading, k_EHTD: torch.Tensor, v_EHTD: torch.Tensor, kept_EHM: torch.Tensor) -> Encoded:
        """Biases and values for kept tokens, fitted to the keys as they will be read: quantised where latent_bits says so."""
        work, tile = reading.attention.dtype, k_EHTD.shape[2]
        keys = k_EHTD.gather(2, kept_EHM[..., None].expand(-1, -1, -1, k_EHTD.shape[3]))
        as_read = QuantizedRows.pack(keys, self.bits).read(work) if self.bits else keys.to(work)
        scores = reading.queries @ as_read.transpose(-1, -2)
        # Coarsely quantised keys may outweigh the whole tile.
        top = torch.maximum(reading.log_mass, scores.logsumexp(-1, keepdim=True))
        rows, whole = (scores - top).exp(), (reading.log_mass - top).exp()

        stands_for = assignment(reading, rows, kept_EHM)
        mass = reading.attention.mean(2).clamp_min(_LEAST_MASS)
        share = stands_for * mass[..., None]
        start = share.sum(2) / (scores - reading.log_mass).exp().mean(2).clamp(_LEAST_MASS, tile)
        bias = fit_masses(rows, whole, start, tile).log().to(k_EHTD.dtype)

        values = v_EHTD.to(work)
        means = (share / share.sum(2, keepdim=True)).transpose(-1, -2) @ values
        weights = (scores + bias.to(work)[:, :, None]).softmax(-1)
        left = reading.attention @ values - weights @ means
        gram = weights.transpose(-1, -2) @ weights
        ridge = self.ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=work, device=gram.device)
        values = means + torch.linalg.solve(gram, weights.transpose(-1, -2) @ left)
        return Encoded(KeyPart(keys), ValuePart(values.to(v_EHTD.dtype)), bias)


@dataclass(frozen=True)
class CompactConfig(CodecConfig):
    """Sizes of a compact capsule."""

    ratios: Sequence[float] = ()
    """Retention ratio, layer by layer; keys and values alike, for a row is both."""
    bank: int = 512
    """Training queries of each KV head that attention is matched for."""
    ridge: float = 1e-3
    """Pull of the values towards the means of the tokens that they stand for, relative to the mean energy of a row's weights."""
    selector: str = "attention"
    """How tokens are ranked: "attention" (root mean square of the weight that the bank gives them) or "learned" (a network)."""
    passes: int = 2
    """Times that the ranking is reordered by what each token adds to those above it; 0 keeps the highest ranked as they are."""
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
            raise ValueError(f"ridge {self.ridge} must be positive (the fit of the values needs it) and scale {self.scale} not negative.")

    def build(self, geometry: KVGeometry, layer: int) -> LayerCodec:
        if len(self.ratios) != geometry.layers:
            raise ValueError(f"{len(self.ratios)} retention ratios for {geometry.layers} layers: give one for each layer.")
        return CompactLayer(geometry.kv_heads, geometry.head_dim, retained(self.ratios[layer], self.tile), self)

"""The same random queries, keys and values through kvcapsule's policies and through code of others: the same tokens are
kept, or the difference is named and, taken away, they are.

    python tests/peers/compare.py --json eval/results/peers.json          (make test-peers)

Runs in an environment of its own, as kvpress asks for a transformers that kvcapsule's inference does not take; policies
and segments need none. It ends with 1 if anything differs that is not explained.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kvpress
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, QuantizedCache

from kvcapsule.environment import machine, versions
from kvcapsule.methods.layer_prefill import LayerPrefill
from kvcapsule.policy import H2O, AdaKV, Kivi, MixKV, Policy, PostVisionAttention, PyramidKV, SnapKV, StreamingLLM
from kvcapsule.policy.pyramidkv import pyramid_counts
from kvcapsule.segments.packed_rows import read_rows
from kvcapsule.vlm.spans import VisualSpan

ROWS, HEADS, GROUP, DIM, TOKENS, WINDOW, LAYERS = 2, 4, 2, 32, 160, 8, 6
REMOVED = 0.7
"""kvpress's compression ratio."""
COUNT = int(TOKENS * (1 - REMOVED))
"""Tokens of a head that it keeps, those of the window with them."""

Kept = list[list[set[int]]]
"""By row and KV head."""


class Attention(torch.nn.Module):
    """What a press sees of an attention layer: its projection hands on the queries as they are."""

    def __init__(self, layer: int = 0) -> None:
        super().__init__()
        self.q_proj, self.layer_idx, self.head_dim = torch.nn.Identity(), layer, DIM
        self.config = SimpleNamespace(
            num_attention_heads=HEADS * GROUP,
            num_key_value_heads=HEADS,
            num_hidden_layers=LAYERS,
            _attn_implementation="sdpa",
        )


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; a token's place is channel 0 of its values. Keys have something in common, as real ones
    do, and some heads attend more sharply than others."""
    generator = torch.Generator().manual_seed(seed)
    query, keys, values = (
        torch.randn(ROWS, heads, TOKENS, DIM, generator=generator) for heads in (HEADS * GROUP, HEADS, HEADS)
    )
    keys += torch.randn(ROWS, HEADS, 1, DIM, generator=generator)
    query *= torch.linspace(0.3, 2.0, HEADS).repeat_interleave(GROUP)[:, None, None]
    values[..., 0] = torch.arange(TOKENS)
    return query, keys, values


def ours(policy: Policy, seed: int, text: int = WINDOW) -> Kept:
    """Visual tokens that a policy stores; the last `text` tokens are text."""
    query, keys, values = inputs(seed)
    spans = [VisualSpan(row, 0, TOKENS - text, (1, 1, TOKENS - text)) for row in range(ROWS)]
    visual, _ = policy.compress(prefill(query, keys, values, spans))
    kept: Kept = [[set() for _ in range(HEADS)] for _ in range(ROWS)]
    for segment in visual:
        for entry, row in enumerate(segment.owner.tolist()):
            there = slice(None) if segment.mask is None else segment.mask[entry]
            stored = read_rows(segment.values, torch.float32)[entry, :, there, 0].long().tolist()
            for place, head in enumerate(range(HEADS) if segment.head is None else [int(segment.head[entry])]):
                kept[row][head] |= set(stored[place])
    return kept


def prefill(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, spans: list[VisualSpan]) -> LayerPrefill:
    valid = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    return LayerPrefill(layer=0, query=query, keys=keys, values=values, spans=spans, valid=valid, scale=DIM**-0.5)


def theirs(press: Any, seed: int, text: int = WINDOW, layer: int = 0, attention: bool = False) -> Kept:
    """Tokens that a press keeps, without the last `text`."""
    query, keys, values = inputs(seed)
    module = Attention(layer)
    rotation = (torch.ones(1, TOKENS, DIM), torch.zeros(1, TOKENS, DIM))
    hidden, weights = query.transpose(1, 2).flatten(2), causal(query, keys) if attention else None
    _, stored = press.compress(module, hidden, keys, values, weights, {"position_embeddings": rotation})
    kept = [[set(stored[row, head, :, 0].long().tolist()) for head in range(HEADS)] for row in range(ROWS)]
    if getattr(module, "masked_key_indices", None) is not None:
        for row, head, token in zip(*(index.tolist() for index in module.masked_key_indices), strict=True):
            kept[row][head].discard(token)
    last = set(range(TOKENS - text, TOKENS))
    assert all(last <= head for row in kept for head in row), "the press dropped a token of its window"
    return [[head - last for head in row] for row in kept]


def causal(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    scores = query @ keys.repeat_interleave(GROUP, dim=1).transpose(2, 3) * DIM**-0.5
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)


def share(count: int, text: int = WINDOW) -> float:
    """The retention that keeps `count` tokens of the image."""
    return count / (TOKENS - text)


@dataclass
class Result:
    """One comparison over all inputs."""

    score: str
    ours: str
    peer: str
    compared: int = 0
    """Kept tokens (codes, for quantisation) that were compared."""
    differ: int = 0
    """Of these, those that only one side has."""
    difference: str | None = None
    """Why, where the two do not define the same thing."""
    differ_without: int | None = None
    """Those that still differ when the named difference is taken away."""

    @property
    def explained(self) -> bool:
        """Nothing differs, or nothing but what is named; what is named must show."""
        if self.difference is None:
            return self.compared > 0 and self.differ == 0
        return self.differ > 0 and self.differ_without == 0


def tokens_apart(a: Kept, b: Kept) -> int:
    return sum(len(x - y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def kept(result: Result, pairs: Callable[[int], tuple[Kept, Kept, Kept | None]], seeds: range) -> Result:
    """Compare kept sets; pairs(seed): ours, theirs, and ours without the named difference."""
    for seed in seeds:
        mine, peer, without = pairs(seed)
        result.compared += sum(len(head) for row in peer for head in row)
        result.differ += tokens_apart(mine, peer) + tokens_apart(peer, mine)
        if without is not None:
            result.differ_without = (
                (result.differ_without or 0) + tokens_apart(without, peer) + tokens_apart(peer, without)
            )
    return result


class ZeroPadded(SnapKV):
    """Pooling that counts what is beyond the edge as 0."""

    def _pool(self, scores_HT: torch.Tensor) -> torch.Tensor:
        return F.avg_pool1d(scores_HT, self.kernel, stride=1, padding=self.kernel // 2)


class MeanOfReaders(H2O):
    """Attention divided by the number of queries that see a token."""

    def scores(self, prefill: LayerPrefill) -> torch.Tensor:
        return super().scores(prefill) / torch.arange(prefill.keys.shape[2], 0, -1)


def snapkv(seeds: range) -> list[Result]:
    visual = share(COUNT - WINDOW)

    def unpooled(seed: int) -> tuple[Kept, Kept, None]:
        press = kvpress.SnapKVPress(REMOVED, window_size=WINDOW, kernel_size=1)
        return ours(SnapKV(visual, WINDOW, kernel=1), seed), theirs(press, seed), None

    def pooled(seed: int) -> tuple[Kept, Kept, Kept]:
        press = kvpress.SnapKVPress(REMOVED, window_size=WINDOW, kernel_size=5)
        mine, without = (ours(policy(visual, WINDOW, kernel=5), seed) for policy in (SnapKV, ZeroPadded))
        return mine, theirs(press, seed), without

    edges = "at the edge of an image kvpress averages over what is not there, as 0; here over what there is"
    return [
        kept(Result("SnapKV without pooling", "snapkv, kernel 1", "kvpress SnapKVPress"), unpooled, seeds),
        kept(Result("SnapKV", "snapkv, kernel 5", "kvpress SnapKVPress", difference=edges), pooled, seeds),
    ]


def pyramidkv(seeds: range) -> list[Result]:
    """Which tokens a layer keeps, given how many; and how many."""
    press = kvpress.PyramidKVPress(REMOVED, window_size=WINDOW, kernel_size=1, beta=4)

    def given_counts(seed: int) -> tuple[Kept, Kept, Kept]:
        sides: list[Kept] = [[], [], []]
        for layer in range(LAYERS):
            peer = theirs(press, seed, layer=layer)
            own = PyramidKV(share(COUNT - WINDOW), WINDOW, kernel=1, beta=4).of_layer(layer, LAYERS)
            as_many = SnapKV(share(len(peer[0][0])), WINDOW, kernel=1)
            for side, found in zip(sides, (ours(own, seed), peer, ours(as_many, seed)), strict=True):
                side += found
        return sides[0], sides[1], sides[2]

    window = (
        "kvpress counts the window within each layer's line, so that its image keeps a line of other slope; given the"
        " same number of tokens, the same ones are kept"
    )
    line = Result("PyramidKV's line", "pyramid_counts, window counted", "kvpress PyramidKVPress.get_layer_budget")
    expected = pyramid_counts(COUNT * LAYERS, LAYERS, TOKENS - WINDOW, 4)
    for layer, count in enumerate(expected):
        line.compared += 1
        # kvpress rounds each layer by itself.
        line.differ += abs(press.get_layer_budget(Attention(layer), TOKENS) - count) > 1
    return [
        kept(
            Result("PyramidKV", "pyramidkv, kernel 1", "kvpress PyramidKVPress", difference=window), given_counts, seeds
        ),
        line,
    ]


def adakv(seeds: range) -> list[Result]:
    count, half = COUNT - WINDOW, 0.5
    safe = int(COUNT * half) - WINDOW
    """Own tokens of a head in kvpress's safeguard: its window is the first to be safe."""

    def peer(safeguard: float, seed: int) -> Kept:
        press = kvpress.SnapKVPress(REMOVED, window_size=WINDOW, kernel_size=1)
        return theirs(kvpress.AdaKVPress(press, alpha_safeguard=safeguard), seed)

    def own(safeguard: float, seed: int) -> Kept:
        return ours(AdaKV(share(count), WINDOW, kernel=1, safeguard=safeguard), seed)

    counted = "kvpress counts the window within the safeguard, so that a head has fewer tokens of its own for sure"
    return [
        kept(
            Result("AdaKV without safeguard", "adakv, safeguard 0", "kvpress AdaKVPress"),
            lambda seed: (own(0.0, seed), peer(0.0, seed), None),
            seeds,
        ),
        kept(
            Result("AdaKV", "adakv, safeguard 0.5", "kvpress AdaKVPress", difference=counted),
            lambda seed: (own(half, seed), peer(half, seed), own((safe + 0.5) / count, seed)),
            seeds,
        ),
    ]


def others(seeds: range) -> list[Result]:
    def streaming(seed: int) -> tuple[Kept, Kept, None]:
        policy, press = StreamingLLM(share(COUNT, 0)), kvpress.StreamingLLMPress(REMOVED, n_sink=4)
        return ours(policy, seed, text=0), theirs(press, seed, text=0), None

    def tova(seed: int) -> tuple[Kept, Kept, None]:
        return (
            ours(PostVisionAttention(share(COUNT - 1, 1)), seed, text=1),
            theirs(kvpress.TOVAPress(REMOVED), seed, 1),
            None,
        )

    def observed(seed: int) -> tuple[Kept, Kept, Kept]:
        press = kvpress.ObservedAttentionPress(REMOVED)
        mine, without = (ours(policy(share(COUNT, 0)), seed, text=0) for policy in (H2O, MeanOfReaders))
        return mine, theirs(press, seed, text=0, attention=True), without

    readers = "kvpress divides by the number of queries that see a token; here, as in H2O's paper, they are summed"
    return [
        kept(Result("StreamingLLM", "streaming-llm", "kvpress StreamingLLMPress"), streaming, seeds),
        kept(Result("TOVA", "post-vision-attention, one text token", "kvpress TOVAPress"), tova, seeds),
        kept(Result("H2O", "h2o", "kvpress ObservedAttentionPress", difference=readers), observed, seeds),
        diversity(seeds),
    ]


def diversity(seeds: range) -> Result:
    """MixKV's other half by itself: with queries of 0 and values of one length all tokens are equally important."""
    result = Result("MixKV's diversity", "mixkv, all tokens equally important", "kvpress KeyDiffPress")
    press = kvpress.KeyDiffPress(REMOVED)
    for seed in seeds:
        query, keys, values = inputs(seed)
        spans = [VisualSpan(row, 0, TOKENS, (1, 1, TOKENS)) for row in range(ROWS)]
        alike = prefill(torch.zeros_like(query), keys, F.normalize(values, dim=3), spans)
        mine = MixKV(share(COUNT, 0), kernel=1, window=1).scores(alike).topk(COUNT).indices
        peer = press.score(Attention(), query, keys, values, None, {}).topk(COUNT).indices
        for a, b in zip(mine.flatten(0, 1).tolist(), peer.flatten(0, 1).tolist(), strict=True):
            result.compared += COUNT
            result.differ += len(set(a) ^ set(b))
    return result


def kivi(seeds: range) -> list[Result]:
    """Rows as transformers' cache reads them, number by number."""
    results = []
    for bits in (2, 4):
        result = Result(
            f"KIVI, {bits} bits", f"kivi{bits}", "transformers QuantizedCache, quanto, axis_key -1, axis_value 0"
        )
        for seed in seeds:
            query, keys, values = inputs(seed)
            config = LlamaConfig(num_hidden_layers=1)
            cache = QuantizedCache("quanto", config, nbits=bits, axis_key=-1, axis_value=0, q_group_size=32)
            cache.update(keys, values, 0)
            peer = [rows[:, :, :TOKENS] for rows in cache.update(keys[:, :, :1], values[:, :, :1], 0)]
            spans = [VisualSpan(row, 0, TOKENS, (1, 1, TOKENS)) for row in range(ROWS)]
            (segment,) = Kivi(bits, 32).compress(prefill(query, keys, values, spans)).visual
            for mine, other, raw in zip((segment.keys, segment.values), peer, (keys, values), strict=True):
                result.compared += other.numel()
                result.differ += int(((read_rows(mine, torch.float32) - other).abs() > 1e-5 * raw.abs().max()).sum())
        results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inputs", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(parsed.seed, parsed.seed + parsed.inputs)
    results = [r for compare in (snapkv, pyramidkv, adakv, others, kivi) for r in compare(seeds)]
    for r in results:
        without = "" if r.difference is None else f", {r.differ_without} without what is named: {r.difference}"
        print(f"{'ok ' if r.explained else 'NOT'} {r.score}: {r.differ} of {r.compared} differ{without}")
    shape = {"rows": ROWS, "kv_heads": HEADS, "query_heads": HEADS * GROUP, "head_dim": DIM, "tokens": TOKENS}
    value = {
        "inputs": {**shape, "window": WINDOW, "kept_of_a_head": COUNT, "layers": LAYERS, "draws": parsed.inputs},
        "seed": parsed.seed,
        "comparisons": [{**asdict(r), "explained": r.explained} for r in results],
        "versions": {**versions(), **{p: version(p) for p in ("kvpress", "optimum-quanto")}},
        "machine": machine(),
    }
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return int(not all(r.explained for r in results))


if __name__ == "__main__":
    sys.exit(main())
